"""A copy of libraries somewhere else: a folder, or a bucket that speaks S3 (or what obstore knows).

Two kinds of writes are enough. What is immutable is created and never replaced; what a name means
is replaced only if it is still what was read (compare and swap: If-Match on the ETag, or a lock and
a look where the store is a folder). Credentials and endpoints come from the environment, as with
any S3 client: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL, and
AWS_ALLOW_HTTP=true for a server without TLS.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from filelock import FileLock

from vectors.errors import BackendUnavailable, InputError
from vectors.formats.atomic import disk_errors
from vectors.paths import expanded
from vectors.store.steps import step

__all__ = ["Remote"]

URL = re.compile(r"[a-z][a-z0-9+.-]*://.*")
CHUNK = 8 << 20


class Remote:
    """The store at `url`: `s3://bucket/prefix`, another URL that obstore knows, or a folder, which
    is made unless `make` is False.

    Raises:
        InputError: a URL that obstore does not know.
        BackendUnavailable: obstore is not installed.
    """

    def __init__(self, url: str, *, make: bool = True) -> None:
        self.url = url
        folder = None if URL.fullmatch(url) else expanded(url).resolve()
        if url.startswith("file://"):
            folder = Path(url.removeprefix("file://"))
        self._folder = folder
        try:
            # Compiled code with a runtime of its own; only those who push or pull need it.
            self._obstore: Any = importlib.import_module("obstore")
            stores: Any = importlib.import_module("obstore.store")
        except ImportError as error:
            raise BackendUnavailable(
                "push and pull need the package obstore; install it with 'pip install obstore'."
            ) from error
        try:
            if folder is not None and not make and not folder.is_dir():
                raise InputError(f"There is no folder {folder}; check the address.")
            if folder is not None:
                with disk_errors(folder):
                    folder.mkdir(parents=True, exist_ok=True)
                self._store = stores.from_url(f"file://{quote(str(folder))}")
            else:
                self._store = stores.from_url(url)
        except (ValueError, self._obstore.exceptions.BaseError) as error:
            raise InputError(
                f"{url[:200]!r} is no place for a library ({_first_line(error)}); use a folder, "
                "s3://bucket/prefix, or another URL of obstore."
            ) from error

    def create(self, key: str, data: bytes | Path) -> bool:
        """Put `data` at `key` unless something is there; return whether it was put."""
        with self._errors(key):
            try:
                self._obstore.put(self._store, key, data, mode="create", use_multipart=False)
            except self._obstore.exceptions.AlreadyExistsError:
                return False
        step("created")
        return True

    def swap(self, key: str, data: bytes, version: str | None) -> bool:
        """Replace what `read` returned with `version`; return False if it has changed since.

        None as the version means that nothing was there.
        """
        if version is None:
            return self.create(key, data)
        with self._errors(key):
            if self._folder is not None:
                with FileLock(str(self._folder / ".names.lock")):
                    found = self.read(key)
                    if found is None or found[1] != version:
                        return False
                    self._obstore.put(self._store, key, data, mode="overwrite")
            else:
                try:
                    self._obstore.put(self._store, key, data, mode={"e_tag": version})
                except self._obstore.exceptions.PreconditionError:
                    return False
        step("swapped")
        return True

    def read(self, key: str) -> tuple[bytes, str] | None:
        """Return what is at `key` and its version, or None."""
        with self._errors(key):
            try:
                found = self._obstore.get(self._store, key)
                return bytes(found.bytes()), found.meta["e_tag"]
            except FileNotFoundError:
                return None

    def chunks(self, key: str) -> Iterator[bytes]:
        """Yield what is at `key` in parts, so that nothing large fills the memory.

        Raises:
            InputError: nothing is there.
        """
        with self._errors(key):
            try:
                for chunk in self._obstore.get(self._store, key).stream(min_chunk_size=CHUNK):
                    yield bytes(chunk)
            except FileNotFoundError:
                raise InputError(
                    f"{self.url} has no {key}, which one of its entries needs; push that entry "
                    "again from a library that has it."
                ) from None

    def size(self, key: str) -> int | None:
        """The bytes at `key`, or None where nothing is."""
        with self._errors(key):
            try:
                return self._obstore.head(self._store, key)["size"]
            except FileNotFoundError:
                return None

    def keys(self, prefix: str) -> Iterator[str]:
        """Yield the keys under `prefix`."""
        with self._errors(prefix):
            for rows in self._obstore.list(self._store, prefix):
                yield from (row["path"] for row in rows)

    def settle(self) -> None:
        """Return once what was created is on the disk; a bucket's answer has said so already."""
        if self._folder is not None:
            os.sync()

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except (self._obstore.exceptions.BaseError, PermissionError, OSError) as error:
            raise BackendUnavailable(
                f"{self.url} could not be used for {key} ({_first_line(error)}); check the address "
                "and the credentials, and run it again: it goes on where it stopped."
            ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__)[:300].rstrip(".:; ")
