"""Folders that are there whole or not at all: a hidden folder beside the target, fsync, rename."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vectors.errors import NameTaken
from vectors.formats.atomic import disk_errors, sync_folder

__all__ = ["EXPORT_FILE", "check_target", "new_folder"]

EXPORT_FILE = "workbench-export.json"
MARKS = (EXPORT_FILE, "workbench-recipe.json")


def check_target(target: Path, force: bool, *, folder: bool) -> None:
    """Say whether something may be written to `target`.

    Raises:
        NameTaken: it exists and `force` was not given, or it is not what an export makes.
    """
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise NameTaken(f"{target} exists; give --force to replace it, or another path.")
    ours = (
        target.is_dir() and any((target / mark).is_file() for mark in MARKS)
        if folder
        else target.is_file()
    )
    if not ours or target.is_symlink():
        raise NameTaken(
            f"{target} is not something that an export made, so it is not replaced; "
            "name another path."
        )


@contextmanager
def new_folder(target: Path, force: bool = False) -> Iterator[Path]:
    """Give a folder to fill, which takes the place of `target` once the block ends well.

    Raises:
        NameTaken: see `check_target`.
        OutOfSpace: no space, or a folder that cannot be written.
    """
    check_target(target, force, folder=True)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        half = target.with_name(f".{target.name[:80]}.{secrets.token_hex(8)}.half")
        old = half.with_suffix(".old")
        half.mkdir()
        try:
            yield half
            for path in half.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            sync_folder(half)
            check_target(target, force, folder=True)
            if target.exists():
                target.rename(old)
            try:
                half.rename(target)
            except OSError:
                if old.exists():
                    old.rename(target)
                raise
            sync_folder(target.parent)
        finally:
            shutil.rmtree(half, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
