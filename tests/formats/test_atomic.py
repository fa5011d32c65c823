"""What is on the disk after a write that failed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vectors.errors import InputError, OutOfSpace
from vectors.formats import canonical_json, write_atomic


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write_atomic(path, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutOfSpace, match="free some space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_canonical_json_has_one_spelling() -> None:
    assert (
        canonical_json({"b": 1.5, "a": ["\u00e9", None, True]})
        == b'{"a":["\\u00e9",null,true],"b":1.5}'
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"x", {"a": object()}])
def test_what_json_cannot_carry_is_refused(value: object) -> None:
    with pytest.raises(InputError, match="cannot be written as JSON"):
        canonical_json(value)
