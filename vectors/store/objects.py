"""Immutable bytes under the name of their own hash: `objects/<h[:2]>/<h>`.

Nothing here is ever changed in place; a crash leaves hidden temporary files and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from vectors.errors import NameNotFound, StoreCorrupt
from vectors.formats.atomic import disk_errors, sync_file, sync_folder
from vectors.formats.canonical import sha256
from vectors.store.steps import step

__all__ = ["Batch", "Objects"]

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
        with Batch(self) as batch:
            digest = batch.add(data)
            batch.commit()
        return digest

    def kept(self, digest: str) -> bool:
        """Whether `digest` is here whole, which is looked at; it counts as new afterwards."""
        path = self.path(digest)
        if not self._whole(path, digest):
            return False
        # The collector spares young files, so this one must look as young as its new user.
        os.utime(path)
        return True

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
        return sum(state.st_size for _, state in self.scan())

    def scan(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Yield every file with its state, hidden ones left out; a file that goes is passed by."""
        yield from _scan(self.root, hidden=False)

    def leftovers(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Yield the hidden files that killed writers left."""
        yield from _scan(self.root, hidden=True)

    @staticmethod
    def _whole(path: Path, digest: str) -> bool:
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == digest
        except OSError:
            return False


class Batch:
    """Objects that are written together, so that the disk is waited for once and not for each.

    `add` writes hidden files, from any thread; `commit` puts all of them under their names, after
    their bytes are on the disk. Without `commit` nothing stays.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._ready: dict[str, Path] = {}
        self._temps: set[Path] = set()

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *_: object) -> None:
        for temp in self._temps:
            with suppress(FileNotFoundError):
                temp.unlink()

    def add(self, data: bytes | Iterable[bytes], expected: str | None = None) -> str:
        """Write `data`, wait until it is on the disk, and return its digest.

        Raises:
            OutOfSpace: no space, or a folder that cannot be written.
            StoreCorrupt: `data` has another digest than `expected`.
        """
        if isinstance(data, bytes) and self._objects.kept(digest := sha256(data)):
            return digest
        hashed = hashlib.sha256()
        temp = self._objects.root / f".{secrets.token_hex(8)}.tmp"
        with disk_errors(self._objects.root):
            self._temps.add(temp)
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
            with os.fdopen(os.open(temp, flags, READ_ONLY), "wb") as file:
                step("file made")
                for chunk in (data,) if isinstance(data, bytes) else data:
                    hashed.update(chunk)
                    file.write(chunk)
                    step("part written")
                sync_file(file)
                step("file synced")
        digest = hashed.hexdigest()
        if expected is not None and digest != expected:
            raise StoreCorrupt(
                f"The {self._objects.what} {expected[:12]} arrived with other bytes than its name "
                "says, and was not kept; fetch it again, or from another copy."
            )
        self._ready[digest] = temp
        return digest

    def commit(self) -> None:
        """Put what was added under its names.

        Raises:
            OutOfSpace: a folder that cannot be written.
        """
        folders: dict[Path, None] = {}
        with disk_errors(self._objects.root):
            for digest, temp in self._ready.items():
                if self._objects.kept(digest):
                    continue
                path = self._objects.path(digest)
                path.parent.mkdir(exist_ok=True)
                step("folder made")
                # Replacing is safe: two writers of one digest have the same bytes, and a file that
                # was damaged is mended.
                temp.replace(path)
                step("file named")
                folders[path.parent] = None
            for folder in (*folders, self._objects.root) if folders else ():
                sync_folder(folder)
                step("folder synced")
        self._ready.clear()


def _scan(folder: Path, hidden: bool) -> Iterator[tuple[Path, os.stat_result]]:
    try:
        rows = sorted(os.scandir(folder), key=lambda row: row.name)
    except FileNotFoundError:
        return
    for row in rows:
        with suppress(FileNotFoundError):
            if row.is_dir(follow_symlinks=False):
                yield from _scan(Path(row.path), hidden)
            elif row.name.startswith(".") == hidden:
                yield Path(row.path), row.stat(follow_symlinks=False)
