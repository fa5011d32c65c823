"""Whether the library's names may mean something else than a moment ago, for little.

SQLite counts the changes that others have committed to a database (`PRAGMA data_version`), exactly and
at once, as seen from one connection that stays open. So a long-lived process that asks at every
request keeps one, where all else opens a connection for one transaction.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from threading import Lock

__all__ = ["Watch"]

Mark = tuple[int, int]


class Watch:
    """Watches the database at `path`; for any thread, and it survives a fork."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = Lock()
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[int, int, int] | None = None
        self._generation = 0
        self._inherited: list[sqlite3.Connection] = []

    def mark(self) -> Mark:
        """Return what equals an earlier mark only if nothing was committed in between.

        Take it before what it is to vouch for is read. Where the database cannot be asked, every
        mark is new.
        """
        with self._lock:
            try:
                state = os.stat(self._path)
                # Another file has taken the place of this one, or a fork has taken us along.
                if self._opened != (state.st_dev, state.st_ino, os.getpid()):
                    self._open((state.st_dev, state.st_ino, os.getpid()))
                assert self._connection is not None
                version = self._connection.execute("PRAGMA data_version").fetchone()[0]
            except (OSError, sqlite3.Error):
                self._opened = None
                self._generation += 1
                version = 0
            return self._generation, version

    def _open(self, here: tuple[int, int, int]) -> None:
        self._generation += 1
        if self._connection is not None:
            if self._opened is not None and self._opened[2] == here[2]:
                self._connection.close()
            else:
                # To close what a parent opened would take its locks and its journal away.
                self._inherited.append(self._connection)
        self._connection = sqlite3.connect(
            self._path, isolation_level=None, check_same_thread=False
        )
        self._opened = here
