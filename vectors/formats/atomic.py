"""Files that are there whole or not at all: temporary file, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from vectors.errors import OutOfSpace

__all__ = ["disk_errors", "sync_file", "sync_folder", "temporary", "write_atomic"]


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failed write at `path` into OutOfSpace."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space there" if full else "choose a folder that can be written"
        raise OutOfSpace(
            f"{error.filename or path} cannot be written ({error.strerror or error}); {advice}."
        ) from error


@contextmanager
def temporary(folder: Path, mode: int = 0o666) -> Iterator[tuple[BinaryIO, Path]]:
    """Open a new hidden file in `folder`; it is gone afterwards unless it was renamed."""
    path = folder / f".{secrets.token_hex(8)}.tmp"
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode), "wb") as file:
        try:
            yield file, path
        finally:
            with suppress(FileNotFoundError):
                path.unlink()


def write_atomic(path: Path, data: bytes) -> None:
    """Put `data` at `path`; a crash leaves the old file or the new one, never half of one.

    Raises:
        OutOfSpace: no space, or a folder that cannot be written.
    """
    with disk_errors(path), temporary(path.parent) as (file, temp):
        file.write(data)
        sync_file(file)
        temp.replace(path)
        sync_folder(path.parent)


def sync_file(file: BinaryIO) -> None:
    """Return once what was written to `file` is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Return once the names in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
