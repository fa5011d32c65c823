"""`store.db`: what names mean, and the history of that; sqlite in WAL mode.

A connection lives for one transaction, so threads, forks and other processes need no care. WAL
needs a local disk: a library on a network file system is not supported.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from filelock import FileLock

from vectors.errors import BackendUnavailable, InputError, OutOfSpace, StoreCorrupt
from vectors.formats.atomic import disk_errors
from vectors.store.steps import step

__all__ = ["Database", "now"]

PATIENCE = 10.0  # seconds to wait for another process's transaction
# One script for each version of the library, from the one before.
SCHEMAS = (
    """
CREATE TABLE names (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, kind TEXT NOT NULL, deleted TEXT);
CREATE UNIQUE INDEX living_names ON names (name) WHERE deleted IS NULL;
CREATE TABLE refs (
    name_id INTEGER NOT NULL REFERENCES names (id), revision INTEGER NOT NULL,
    digest TEXT NOT NULL, created TEXT NOT NULL, PRIMARY KEY (name_id, revision));
CREATE INDEX refs_by_digest ON refs (digest);
CREATE TABLE reflog (
    id INTEGER PRIMARY KEY AUTOINCREMENT, created TEXT NOT NULL, action TEXT NOT NULL,
    name TEXT NOT NULL, revision INTEGER NOT NULL, digest TEXT NOT NULL, detail TEXT NOT NULL);
CREATE TABLE leases (
    id INTEGER PRIMARY KEY, digest TEXT NOT NULL, holder TEXT NOT NULL,
    pid INTEGER NOT NULL, expires REAL NOT NULL);
CREATE TABLE attestations (
    id INTEGER PRIMARY KEY AUTOINCREMENT, digest TEXT NOT NULL, kind TEXT NOT NULL,
    object TEXT NOT NULL, created TEXT NOT NULL);
CREATE INDEX attestations_by_digest ON attestations (digest);
""",
    """
ALTER TABLE names ADD COLUMN collected TEXT;
ALTER TABLE attestations ADD COLUMN passed INTEGER;
CREATE TABLE tags (
    name_id INTEGER NOT NULL REFERENCES names (id), tag TEXT NOT NULL, revision INTEGER NOT NULL,
    created TEXT NOT NULL, PRIMARY KEY (name_id, tag));
CREATE TABLE pins (digest TEXT PRIMARY KEY, reason TEXT NOT NULL, created TEXT NOT NULL);
CREATE TABLE entries (
    digest TEXT PRIMARY KEY, kind TEXT NOT NULL, base TEXT NOT NULL, bytes INTEGER NOT NULL);
""",
    """
ALTER TABLE reflog ADD COLUMN name_id INTEGER;
ALTER TABLE reflog ADD COLUMN undoes INTEGER;
""",
)
VERSION = len(SCHEMAS)
# Primary result codes of sqlite; Python names only the exception classes for them.
NO_WRITE = {
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
}
CHANGE = "BEGIN IMMEDIATE"
WAITED = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


def now() -> str:
    """The time as ISO-8601 in UTC, such as `2026-11-22T10:00:00.000+00:00`."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def check_time(text: str) -> str:
    """Return a time from elsewhere, or raise ValueError where `now` cannot have written it by tomorrow."""
    when = datetime.fromisoformat(text)
    if when.tzinfo is None or when.astimezone(UTC).isoformat(timespec="milliseconds") != text:
        raise ValueError("not a time in UTC with milliseconds")
    if when > datetime.now(UTC) + timedelta(days=1):
        raise ValueError("a time that has not come")
    return text


class Database:
    """The tables at `path`, made on the first opening.

    Raises:
        OutOfSpace: a folder that cannot be written.
        StoreCorrupt: a file that is no database, or one of a newer version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if self._version() != VERSION:
            with disk_errors(path), FileLock(f"{os.fspath(path)}.lock"):
                self._create()

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A transaction that sees one state of the library."""
        yield from self._transaction("BEGIN")

    @contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """A transaction that changes the library whole or not at all; one at a time."""
        yield from self._transaction(CHANGE)

    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        with self._errors(), closing(self._connect()) as db:
            db.execute(begin)
            try:
                yield db
                if begin == CHANGE:
                    step("changed, not committed")
            except BaseException:
                if db.in_transaction:  # sqlite ends it itself where the disk is full
                    db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")
            if begin == CHANGE:
                step("committed")

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None)
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        return db

    def _version(self) -> int:
        if not self.path.exists():
            return 0
        with self._errors(), closing(self._connect()) as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            raise StoreCorrupt(
                f"{self.path} was written by a newer workbench (version {version} of the library); "
                "update this one."
            )
        return version

    def _create(self) -> None:
        version = self._version()
        if version == 0 and any(self.path.parent.glob("manifests/*.json")):
            raise StoreCorrupt(
                f"{self.path} is empty or gone, and entries lie beside it; restore it from a copy of the "
                "library, or move the folder away to begin a new one."
            )
        with self._errors(), closing(self._connect()) as db:
            db.execute("PRAGMA journal_mode = WAL")
            for number, script in enumerate(SCHEMAS[version:], version + 1):
                db.executescript(f"{CHANGE}; {script} PRAGMA user_version = {number}; COMMIT;")
                step("brought up to date")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (UnicodeEncodeError, OverflowError) as error:
            raise InputError(
                f"The library holds nothing like that ({error}); use plain text and smaller numbers."
            ) from error
        except sqlite3.Error as error:
            code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
            if code in WAITED:
                raise BackendUnavailable(
                    f"Another process has kept {self.path} busy for {PATIENCE:.0f} s; try again."
                ) from error
            if code in NO_WRITE:
                raise OutOfSpace(
                    f"{self.path} cannot be written ({error}); free some space there, or choose a "
                    "folder that can be written."
                ) from error
            raise StoreCorrupt(
                f"{self.path} is damaged ({error}); restore it from a copy of the library."
            ) from error
