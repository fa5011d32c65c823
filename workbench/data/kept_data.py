"""Data that a person has handed over, kept where a run can read it again."""

from __future__ import annotations

import hashlib
from pathlib import Path

from vectors.errors import InputError
from vectors.formats.atomic import disk_errors, write_atomic
from workbench.settings import Home

__all__ = ["keep_data"]

SUFFIXES = (".jsonl", ".json", ".txt", ".md")


def keep_data(home: Home, raw: bytes, suffix: str) -> Path:
    """Keep bytes under the digest of their content; the same ones are kept once.

    Raises:
        InputError: an ending that no data has.
        OutOfSpace: they cannot be written.
    """
    if suffix not in SUFFIXES:
        raise InputError(f"The file's ending is {suffix[:20]!r}; use {', '.join(SUFFIXES)}.")
    path = home.library / "data" / f"{hashlib.sha256(raw).hexdigest()[:32]}{suffix}"
    if not path.exists():
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, raw)
    return path
