"""Stops work between any two of its steps: kills the process, or fails the disk."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path

from vectors.store import Library, exchange
from vectors.store.steps import watch

Work = Callable[[Path], None]


def count(work: Work, folder: Path) -> int:
    """How many steps the work has; `folder` is changed by it."""
    seen: list[str] = []
    watch(seen.append)
    try:
        work(folder)
    finally:
        watch(None)
    return len(seen)


def killed(
    work: Work, start: Path, space: Path, context: SpawnContext | ForkServerContext | None = None
) -> Iterator[tuple[int, Path]]:
    """Yield a folder for every n: `start`, on which `work` was killed by signal 9 at its step n.

    The work is done in a fork of this process, or in a process of `context`.
    """
    shutil.copytree(start, space / "count")
    steps = count(work, space / "count")
    assert steps > 0
    for number in range(1, steps + 1):
        folder = space / f"killed-{number}"
        shutil.copytree(start, folder)
        worker = (context or get_context("fork")).Process(target=die, args=(work, folder, number))
        worker.start()
        worker.join()
        assert worker.exitcode == -signal.SIGKILL, (number, worker.exitcode)
        yield number, folder
        shutil.rmtree(folder)


def die(work: Work, folder: Path, number: int) -> None:
    """Do the work and be killed at its step `number`."""
    watch(_killer(number))
    work(folder)


def _killer(number: int) -> Callable[[str], None]:
    left, lock = [number], threading.Lock()

    def look(_: str) -> None:
        with lock:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    return look


def readable(library: Library) -> dict[str, str]:
    """Read every revision of every name to the last byte; return the digests by name@revision."""
    found = {}
    for entry in library.list():
        for past in library.history(entry.name):
            for digest in past.manifest.objects():
                library.objects.read(digest)
            for attested in library.attestations(past.digest):
                for stored in attested["attested"]["files"].values():
                    library.objects.read(stored)
            found[f"{past.name}@{past.revision}"] = past.digest
    return found


def push_to(root: Path, url: str, environment: Mapping[str, str]) -> None:
    """Push all of a library; a forked process has the environment of its server, not of the test."""
    os.environ.update(environment)
    Library(root).push(url)


def push_work(folder: Path) -> None:
    """Push, one thing after the other, so that the n-th step is always the same."""
    exchange.WORKERS, usual = 1, exchange.WORKERS
    try:
        Library(folder / "library").push(str(folder / "copy"))
    finally:
        exchange.WORKERS = usual
