"""Who uses what right now, so that it is not deleted under them.

A lease ends with its block, with its process, or with its time, whichever comes first: a process
that was killed holds nothing, and a process number given out anew holds nothing for long.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vectors.store.database import Database

__all__ = ["Leases", "alive", "holders"]

DAY = 86_400.0


class Leases:
    """The leases of the library at `database`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @contextmanager
    def lease(self, digest: str, holder: str, seconds: float = DAY) -> Iterator[None]:
        """Say that `holder` uses `digest` for as long as the block runs."""
        with self._database.change() as db:
            db.execute("DELETE FROM leases WHERE expires < ?", (time.time(),))
            lease = db.execute(
                "INSERT INTO leases (digest, holder, pid, expires) VALUES (?, ?, ?, ?)",
                (digest, holder, os.getpid(), time.time() + seconds),
            ).lastrowid
        try:
            yield
        finally:
            with self._database.change() as db:
                db.execute("DELETE FROM leases WHERE id = ?", (lease,))


def holders(db: sqlite3.Connection, digests: Sequence[str]) -> list[str]:
    """Return who holds a lease on one of `digests`, in words."""
    rows = db.execute(
        "SELECT digest, holder, pid FROM leases WHERE expires >= ?", (time.time(),)
    ).fetchall()
    wanted = set(digests)
    return sorted(
        {
            f"{row['holder']} (process {row['pid']})"
            for row in rows
            if row["digest"] in wanted and alive(row["pid"])
        }
    )


def alive(pid: int) -> bool:
    """Whether a process has this number now."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
