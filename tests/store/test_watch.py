"""A mark differs as soon as somebody has committed, and only then."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from vectors.store import Library
from vectors.types import SteeringVector

Make = Callable[..., SteeringVector]


def _tag(root: Path) -> None:
    Library(root).tag("cheerful@1", "stable")


def test_a_mark_differs_after_every_change(library: Library, vector: Make) -> None:
    library.save_vector("cheerful", vector(1))
    watch = library.watch()
    changes = [
        lambda: library.save_vector("cheerful", vector(2)),
        lambda: library.save_vector("cheerful", vector(1)),
        lambda: library.rename("cheerful", "happy"),
        lambda: library.rename("happy", "cheerful"),
        lambda: library.delete("cheerful"),
        lambda: library.restore("cheerful"),
    ]
    for change in changes:
        before = watch.mark()
        library.list()
        assert watch.mark() == before, "a look is no change"
        change()
        assert watch.mark() != before


def test_another_process_is_seen(library: Library, vector: Make) -> None:
    library.save_vector("cheerful", vector(1))
    watch = library.watch()
    before = watch.mark()
    process = multiprocessing.get_context("spawn").Process(target=_tag, args=(library.root,))
    process.start()
    process.join()
    assert process.exitcode == 0 and watch.mark() != before


def test_another_file_and_none(library: Library, vector: Make, tmp_path: Path) -> None:
    library.save_vector("cheerful", vector(1))
    watch = library.watch()
    before = watch.mark()
    path = library.root / "store.db"
    shutil.copy(path, tmp_path / "copy")
    os.replace(tmp_path / "copy", path)
    after = watch.mark()
    assert after != before and watch.mark() == after
    path.unlink()
    assert len({after, watch.mark(), watch.mark()}) == 3, "what cannot be asked vouches for nothing"


def test_threads_and_forks(library: Library, vector: Make) -> None:
    library.save_vector("cheerful", vector(1))
    watch = library.watch()
    before = watch.mark()
    seen: list[tuple[int, int]] = []
    thread = threading.Thread(target=lambda: seen.append(watch.mark()))
    thread.start()
    thread.join()
    assert seen == [before]
    read, write = os.pipe()
    if not (child := os.fork()):
        first = watch.mark()
        library.save_vector("formal", vector(2))
        os.write(write, b"changed" if watch.mark() != first != before else b"missed")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 10) == b"changed"
    assert watch.mark() != before, "what the child did"
