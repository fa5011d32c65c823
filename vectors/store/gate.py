"""Writers together, the collector alone: a lock over processes that a killed one cannot keep.

A commit writes objects first and their names last, so in between nothing means the objects. The
collector must not look at that moment. Writers share the gate from their first object to their
name; the collector has it alone. A turnstile before the gate keeps new writers out while the
collector waits, so that steady writers cannot starve it. The kernel frees both locks when a process
dies.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vectors.errors import BackendUnavailable
from vectors.formats.atomic import disk_errors

__all__ = ["Gate"]

PATIENCE = 30.0  # seconds that the collector waits for writers
PAUSE = 0.01


class Gate:
    """The gate of the library in the folder `root`."""

    def __init__(self, root: Path) -> None:
        self._gate = root / "gate.lock"
        self._turnstile = root / "turnstile.lock"
        self._mine = threading.local()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the gate together with other writers; may be nested in one thread."""
        depth = getattr(self._mine, "depth", 0)
        if depth:
            self._mine.depth = depth + 1
            try:
                yield
            finally:
                self._mine.depth = depth
            return
        with _opened(self._gate) as gate:
            with _opened(self._turnstile) as turnstile:
                fcntl.flock(turnstile, fcntl.LOCK_SH)
                fcntl.flock(gate, fcntl.LOCK_SH)
            self._mine.depth = 1
            try:
                yield
            finally:
                self._mine.depth = 0

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the gate while nobody else does.

        Raises:
            BackendUnavailable: others hold it for longer than the collector waits.
        """
        with _opened(self._turnstile) as turnstile, _opened(self._gate) as gate:
            fcntl.flock(turnstile, fcntl.LOCK_EX)
            self._wait(gate)
            yield

    def _wait(self, gate: int) -> None:
        limit = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= limit:
                    raise BackendUnavailable(
                        f"Something has been saving to {self._gate.parent} for {PATIENCE:.0f} s; "
                        "collect when it is done."
                    ) from None
                time.sleep(PAUSE)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    with disk_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)  # closing frees the lock
