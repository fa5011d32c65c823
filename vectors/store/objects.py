"""Immutable bytes under the name of their own hash: `objects/<h[:2]>/<h>`.

Nothing here is ever changed in place; a crash leaves hidden temporary files and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from vectors.errors import NameNotFound, StoreCorrupt
from vectors.formats.atomic import disk_errors, sync_file, sync_folder, temporary
from vectors.formats.canonical import sha256

__all__ = ["Objects"]

DIGEST = re.compile(r"[0-9a-f]{64}")
READ_ONLY = 0o444


class Objects:
    """A folder of content-addressed files."""

    what = "object"

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, digest: str) -> Path:
        """Where the bytes of `digest` are or would be; always inside the root.

        Raises:
            NameNotFound: text that is not a digest.
        """
        if not DIGEST.fullmatch(digest):
            raise NameNotFound(
                f"{digest[:80]!r} is not a digest; give 64 lower-case hex digits, or a name."
            )
        return self.root / self.place(digest)

    def place(self, digest: str) -> str:
        """The path inside the root."""
        return f"{digest[:2]}/{digest}"

    def write(self, data: bytes | Iterable[bytes]) -> str:
        """Keep `data` and return its digest; bytes that are already there are not kept twice.

        Raises:
            OutOfSpace: no space, or a folder that cannot be written.
        """
        hashed = hashlib.sha256()
        with disk_errors(self.root), temporary(self.root, READ_ONLY) as (file, temp):
            for chunk in (data,) if isinstance(data, bytes) else data:
                hashed.update(chunk)
                file.write(chunk)
            digest = hashed.hexdigest()
            path = self.path(digest)
            if self._whole(path, digest):
                # A sweep spares young files, so this one must look as young as its new user.
                os.utime(path)
                return digest
            sync_file(file)
            path.parent.mkdir(exist_ok=True)
            # Replacing is safe: two writers of one digest have the same bytes, and a file that
            # was damaged is mended.
            temp.replace(path)
            sync_folder(path.parent)
            sync_folder(self.root)
        return digest

    def read(self, digest: str) -> bytes:
        """Return the bytes of `digest`, checked against it.

        Raises:
            StoreCorrupt: the file is missing, cannot be read, or has other bytes.
        """
        path = self.path(digest)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StoreCorrupt(
                f"The {self.what} {digest[:12]} cannot be read at {path} ({error.strerror}); "
                "restore it from a copy of the library, or save its entry again."
            ) from error
        if sha256(data) != digest:
            raise StoreCorrupt(
                f"The {self.what} {digest[:12]} at {path} is damaged: its bytes are not what its "
                "name says; restore it from a copy of the library, or save its entry again."
            )
        return data

    def __contains__(self, digest: str) -> bool:
        return self.path(digest).is_file()

    def size(self, digest: str) -> int:
        """The bytes that `digest` takes on the disk, 0 where it is missing."""
        try:
            return self.path(digest).stat().st_size
        except OSError:
            return 0

    def total(self) -> int:
        """The bytes that all of them take on the disk."""
        return sum(self.size(path.stem) for path in self.root.rglob("[!.]*") if path.is_file())

    @staticmethod
    def _whole(path: Path, digest: str) -> bool:
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == digest
        except OSError:
            return False
