"""kill -9 and a full disk at every step of every change: nothing that had a name is ever lost."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
import sqlite3
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from tests_support.faults import killed, readable

from vectors.errors import NameNotFound, NameTaken, OutOfSpace
from vectors.store import Library
from vectors.store.steps import watch
from vectors.tasks import Recipe
from vectors.types import SteeringVector

Make = Callable[..., SteeringVector]
BASE = "ba" * 32
ZEROS = {n: torch.zeros(5, 3, dtype=torch.bfloat16) for n in "abc"}
TUNED = {n: torch.full((5, 3), i + 1.0).bfloat16() for i, n in enumerate("abc")}
IN_DATABASE = ("changed, not committed", "name collected", "rows deleted")
V_D = torch.tensor([0.6, 0.8])


def vector(number: int) -> SteeringVector:
    return SteeringVector(BASE, {0: V_D}, {0: 1.0}, 0, {"n": number})


def old(library: Library) -> None:
    """Make all files too old for a grace period."""
    for path in library.root.rglob("*"):
        if path.is_file():
            os.utime(path, (1, 1))


def commit_vector(root: Path) -> None:
    Library(root).save_vector("cheerful", vector(9), files={"x.json": b"{}", "y.json": b"[]"})


def commit_task(root: Path) -> None:
    Library(root).save_task("new", BASE, ZEROS, TUNED, files={"log.txt": b"text"})


def commit_recipe(root: Path) -> None:
    library = Library(root)
    terms = ((library.get("task").digest, -0.5),)
    library.save_recipe("without", Recipe(base=BASE, terms=terms))


def attest(root: Path) -> None:
    library = Library(root)
    library.attest(library.get("cheerful").digest, "evaluation", {"x": 1}, files={"p": b"[1]"})


def move(root: Path) -> None:
    library = Library(root)
    library.revert("cheerful@1")
    library.tag("cheerful", "stable")
    library.pin("cheerful@2")
    library.rename("cheerful", "glad")
    library.delete("glad")
    library.restore("glad")
    library.untag("glad", "stable")
    library.unpin("glad@2")


def collect(root: Path) -> None:
    Library(root).gc(retention=0, grace=1)


def check(root: Path) -> None:
    Library(root).fsck()


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A library with entries of each kind, and garbage of each kind."""
    library = Library(tmp_path / "start")
    for number in (1, 2):
        library.save_vector("cheerful", vector(number), files={"x.json": b"%d" % number})
    task = library.save_task("task", BASE, ZEROS, {"a": TUNED["b"]})
    library.save_recipe("recipe", Recipe(base=BASE, terms=((task.digest, 1.0),)))
    library.attest(library.get("cheerful").digest, "verdict", {"passed": True}, files={"p": b"[]"})
    library.save_vector("gone", vector(7), files={"x.json": b"gone"})
    library.attest(library.get("gone").digest, "verdict", {"passed": False}, files={"p": b"-"})
    library.delete("gone")
    library.put_vector(vector(8))
    (library.objects.root / ".left.tmp").write_bytes(b"half")
    old(library)
    return library.root


WORKS = [commit_vector, commit_task, commit_recipe, attest, move, collect]


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.__name__)
def test_kill_9_at_every_step(start: Path, tmp_path: Path, work: Callable[[Path], None]) -> None:
    before = readable(Library(start))
    finished = tmp_path / "finished"
    shutil.copytree(start, finished)
    work(finished)
    after = readable(Library(finished))
    for number, folder in killed(work, start, tmp_path):
        library = Library(folder)
        found = library.fsck()
        assert found.clean, (number, found.faults)
        names = readable(library)
        if work is move:  # killed between two moves, it may be under either name, or deleted
            names |= {k.replace("glad", "cheerful"): v for k, v in names.items()}
            if "cheerful@1" not in names:
                library.restore("glad")
                names = {k.replace("glad", "cheerful"): v for k, v in readable(library).items()}
        assert before.items() <= names.items(), number
        if work is not move:
            assert names in (before, after), number
            work(folder)  # what was begun can be done again
            again = readable(library)
            assert set(after.values()) == set(again.values()), number
        library.gc(retention=0, grace=0)
        assert library.fsck().clean


def test_kill_9_while_damage_is_moved_aside(start: Path, tmp_path: Path) -> None:
    library = Library(start)
    entry = library.get("cheerful")
    damaged = library.objects.path(entry.manifest.files["x.json"])
    damaged.chmod(0o644)
    damaged.write_bytes(b"?")
    for _, folder in killed(check, start, tmp_path):
        found = Library(folder)
        found.fsck()
        moved = list((folder / "quarantine" / "objects").iterdir())
        assert [path.read_bytes() for path in moved] == [b"?"]
        found.save_vector("cheerful", vector(2), files={"x.json": b"2"})
        assert found.fsck().clean


@pytest.mark.parametrize("work", [commit_task, attest, move, collect], ids=lambda w: w.__name__)
def test_a_disk_that_fails_at_every_step(
    start: Path, tmp_path: Path, work: Callable[[Path], None]
) -> None:
    before = readable(Library(start))
    number = 0
    while True:
        number += 1
        folder = tmp_path / f"full-{number}"
        shutil.copytree(start, folder)
        left = [number]

        def fail(what: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0 and what in IN_DATABASE:
                error = sqlite3.OperationalError("database or disk is full")
                error.sqlite_errorcode = sqlite3.SQLITE_FULL
                raise error
            if left[0] == 0 and what != "committed":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        watch(fail)
        try:
            work(folder)
        except OutOfSpace as error:
            assert "free some space" in str(error)
        finally:
            watch(None)
        if left[0] > 0:
            return  # it has no more steps
        library = Library(folder)
        assert library.fsck().clean
        if work is not move:
            assert before.items() <= readable(library).items()
            work(folder)
        # Whoever fails without being killed leaves no half-written file.
        mine = {path.name for path, _ in library.objects.leftovers()} - {".left.tmp"}
        assert mine == set()
        shutil.rmtree(folder)


def test_a_full_database_is_out_of_space(start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(start)
    real = library._database._connect

    def connect() -> sqlite3.Connection:
        db = real()
        db.execute(f"PRAGMA max_page_count = {db.execute('PRAGMA page_count').fetchone()[0]}")
        return db

    monkeypatch.setattr(library._database, "_connect", connect)
    with pytest.raises(OutOfSpace, match="free some space"):
        for number in range(1000):
            library.pin("cheerful", f"{number}" * 400)
            library.save_vector("cheerful", vector(number))
    monkeypatch.undo()
    assert library.fsck().clean
    readable(library)


def test_a_folder_that_others_own_is_refused(start: Path) -> None:
    for path in (start, *start.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for path in start.parents:
        if "pytest" in path.name:
            path.chmod(0o755)
    if (child := os.fork()) == 0:
        code = 1
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            commit_vector(start)
        except OutOfSpace as error:
            code = 0 if "choose a folder that can be written" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for path in (start, *start.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert Library(start).fsck().clean


def _busy(root: Path, worker: int, rounds: int) -> None:
    library, choose = Library(root), random.Random(worker)
    for number in range(rounds):
        mine = vector(1000 * worker + number)
        library.save_vector(f"own-{worker}", mine, files={"n.json": b"%d" % number})
        shared = library.save_vector("shared", vector(number % 3), files={"s.json": b"shared"})
        library.attest(shared.digest, "verdict", {"passed": True, "worker": worker})
        try:
            choose.choice(
                [
                    lambda: library.revert("shared@1"),
                    lambda: library.tag("shared", "stable", move=True),
                    lambda: library.rename("ball", f"ball-{worker}"),
                    lambda: library.rename(f"ball-{worker}", "ball"),
                    lambda: library.delete("coming"),
                    lambda: library.restore("coming"),
                    lambda: library.save_vector("coming", vector(5), files={"c.json": b"c"}),
                    partial(library.put_vector, vector(2000 + number)),
                ]
            )()
        except (NameNotFound, NameTaken) as error:
            assert str(error)
        except Exception as error:
            if "what 'shared' means already" not in str(error):
                raise
        if number % 3 == worker % 3:
            library.gc(retention=0.2, grace=0)


def test_eight_processes_commit_move_and_collect_at_once(tmp_path: Path) -> None:
    library = Library(tmp_path)
    for name in ("shared", "ball", "coming"):
        library.save_vector(name, vector(0), files={"s.json": b"shared"})
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_busy, args=(tmp_path, w, 8)) for w in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 8
    found = library.fsck()
    assert found.clean, found.faults
    names = readable(library)
    for worker in range(8):
        assert sum(name.startswith(f"own-{worker}@") for name in names) == 8
    revisions = [entry.revision for entry in library.history("shared")]
    assert revisions == list(range(len(revisions), 0, -1)) and len(revisions) >= 65
    time.sleep(0.3)
    library.gc(retention=0.2, grace=0)
    assert readable(library) == names
    assert library.fsck().clean
