"""Content-addressed files: what goes in comes out, or an error says so."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from vectors.errors import NameNotFound, OutOfSpace, StoreCorrupt
from vectors.store.objects import Objects


@pytest.fixture
def objects(tmp_path: Path) -> Objects:
    return Objects(tmp_path)


def files(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def test_named_by_hash_and_kept_once(objects: Objects, tmp_path: Path) -> None:
    digest = objects.write(b"hello")
    assert digest == hashlib.sha256(b"hello").hexdigest()
    assert objects.write(iter([b"he", b"llo"])) == digest
    assert objects.read(digest) == b"hello"
    assert digest in objects
    assert "0" * 64 not in objects
    assert files(tmp_path) == [f"{digest[:2]}/{digest}"]
    assert objects.total() == objects.size(digest) == 5


def test_a_second_writer_makes_it_young_again(objects: Objects) -> None:
    path = objects.path(objects.write(b"hello"))
    os.utime(path, (1, 1))
    objects.write(b"hello")
    assert path.stat().st_mtime > 1


def test_damage_is_found_and_mended_by_saving_again(objects: Objects) -> None:
    digest = objects.write(b"hello")
    objects.path(digest).chmod(0o644)
    objects.path(digest).write_bytes(b"jello")
    with pytest.raises(StoreCorrupt, match=f"{digest[:12]}.*damaged.*save its entry again"):
        objects.read(digest)
    objects.write(b"hello")
    assert objects.read(digest) == b"hello"


def test_missing_is_corrupt(objects: Objects) -> None:
    with pytest.raises(StoreCorrupt, match="cannot be read"):
        objects.read("0" * 64)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_no_path_leaves_the_root(objects: Objects, name: str) -> None:
    for method in (objects.path, objects.read, objects.size):
        with pytest.raises(NameNotFound, match="not a digest"):
            method(name)


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "free some space"), (errno.EROFS, "choose a folder"), (errno.EACCES, "choose")],
)
def test_a_disk_that_takes_nothing(
    objects: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OutOfSpace, match=words):
        objects.write(b"hello")
    assert files(tmp_path) == []
