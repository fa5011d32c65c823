"""Several processes at once, and processes that are killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vectors.store import Library

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
WRITER = """
import sys, torch
from pathlib import Path
from vectors.store import Library
from vectors.types import SteeringVector

library = Library(Path(sys.argv[1]))
base = {f"t{i}": torch.zeros(50_000) for i in range(4)}
print("ready", flush=True)
for n in range(100_000):
    v = torch.randn(8)
    vector = SteeringVector("ba" * 32, {0: v / v.norm()}, {0: 1.0}, 0, {"n": n})
    library.save_vector("vector", vector, files={"big.json": bytes(200_000)})
    library.save_task("task", "ba" * 32, base, {k: torch.randn(50_000) for k in base})
    library.rename("vector", "other"); library.rename("other", "vector")
"""


@pytest.mark.parametrize("seconds", [0.02, 0.11, 0.23])
def test_kill_9_leaves_only_whole_entries(tmp_path: Path, seconds: float) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"ready\n"
    time.sleep(seconds)
    writer.send_signal(signal.SIGKILL)
    writer.communicate()

    library = Library(tmp_path)
    for entry in library.list():
        for revision in library.history(entry.name):
            assert library.get(f"{entry.name}@{revision.revision}") == revision
            for digest in revision.manifest.objects():
                library.objects.read(digest)
    for path in library.objects.root.glob("??/*"):
        library.objects.read(path.name)
    saved = [row for row in library.log(1000) if row.action == "save"]
    assert len(saved) == sum(len(library.history(e.name)) for e in library.list())


def _save(root: Path, worker: int, times: int) -> None:
    # A fork has none of torch's threads, so this saves a revision without computing one.
    library = Library(root)
    digest = library.get("shared").digest
    for number in range(times):
        library.attest(digest, "evaluation", {"worker": worker, "number": number})
        library._changes.save("shared", "steering-vector", digest)


def test_two_processes_share_a_library(tmp_path: Path, vector) -> None:
    Library(tmp_path).save_vector("shared", vector())
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_save, args=(tmp_path, w, 10)) for w in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0, 0]
    library = Library(tmp_path)
    entry = library.get("shared")
    assert [e.revision for e in library.history("shared")] == list(range(21, 0, -1))
    found = [(a["worker"], a["number"]) for a in library.attestations(entry.digest)]
    assert sorted(found) == [(w, n) for w in range(2) for n in range(10)]


def _open(root: Path) -> None:
    Library(root)


def test_many_open_a_new_library_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_open, args=(tmp_path / "new",)) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0] * 6
