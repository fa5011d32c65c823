"""What names mean: one name space over all kinds, every save a revision."""

from __future__ import annotations

import difflib
import sqlite3
from dataclasses import dataclass, field

from vectors.errors import NameNotFound
from vectors.store.database import Database
from vectors.store.reference import Reference

__all__ = ["NEWEST", "SELECT", "Ref", "Refs", "living"]

SELECT = """SELECT names.name, names.kind, refs.revision, refs.digest, refs.created,
                   entries.base, entries.bytes
            FROM refs JOIN names ON names.id = refs.name_id
            LEFT JOIN entries ON entries.digest = refs.digest
            WHERE names.deleted IS NULL"""
NEWEST = "ORDER BY refs.revision DESC LIMIT 1"
FIND = f"""{SELECT} AND names.name = ?1
           AND (?2 IS NULL OR refs.revision = ?2)
           AND (?3 IS NULL OR substr(refs.created, 1, 10) <= ?3)
           AND (?4 IS NULL OR substr(refs.digest, 1, length(?4)) = ?4)
           AND (?5 IS NULL OR refs.revision =
                (SELECT revision FROM tags WHERE name_id = names.id AND tag = ?5)) {NEWEST}"""


@dataclass(frozen=True)
class Ref:
    """One revision of one name; base ("" is none) and bytes are None where no index has them."""

    name: str
    kind: str
    revision: int
    digest: str
    created: str
    base: str | None = field(default=None, compare=False)
    bytes: int | None = field(default=None, compare=False)


class Refs:
    """Looks names up in `database`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def find(self, reference: Reference) -> Ref | None:
        """Return what `reference` points at, or None where no entry has the name.

        Raises:
            NameNotFound: the name is there, and the revision is not.
        """
        with self._database.read() as db:
            if living(db, reference.name) is None:
                return None
            asked = (reference.revision, reference.until, reference.digest, reference.tag)
            row = db.execute(FIND, (reference.name, *asked)).fetchone()
        if row is None:
            raise NameNotFound(
                f"'{reference.name}' has nothing at '@{next(a for a in asked if a is not None)}'; "
                f"see `workbench library log {reference.name}` for its revisions."
            )
        return Ref(*row)

    def of_digest(self, digest: str) -> Ref | None:
        """Return the newest revision of any name that means `digest`."""
        with self._database.read() as db:
            row = db.execute(
                f"{SELECT} AND refs.digest = ? ORDER BY refs.created DESC LIMIT 1", (digest,)
            ).fetchone()
        return None if row is None else Ref(*row)

    def newest(self) -> list[Ref]:
        """Return the newest revision of every name, by name."""
        with self._database.read() as db:
            rows = db.execute(
                f"""{SELECT} AND refs.revision =
                    (SELECT max(revision) FROM refs AS r WHERE r.name_id = names.id)
                    ORDER BY names.name"""
            ).fetchall()
        return [Ref(*row) for row in rows]

    def all(self) -> list[Ref]:
        """Return every revision of every name, by name, the oldest first."""
        with self._database.read() as db:
            rows = db.execute(f"{SELECT} ORDER BY names.name, refs.revision").fetchall()
        return [Ref(*row) for row in rows]

    def history(self, name: str) -> list[Ref]:
        """Return all revisions of `name`, the newest first.

        Raises:
            NameNotFound: no such name.
        """
        with self._database.read() as db:
            rows = db.execute(
                f"{SELECT} AND names.name = ? ORDER BY refs.revision DESC", (name,)
            ).fetchall()
        if not rows:
            raise self.not_found(name)
        return [Ref(*row) for row in rows]

    def not_found(self, name: str) -> NameNotFound:
        """The error for a name that means nothing, with the likeliest one that was meant."""
        with self._database.read() as db:
            rows = db.execute("SELECT name, deleted FROM names").fetchall()
        present = sorted(row["name"] for row in rows if row["deleted"] is None)
        if name in {row["name"] for row in rows}:
            return NameNotFound(f"'{name}' was deleted; bring it back with `restore`.")
        near = difflib.get_close_matches(name, present, n=1)
        advice = f"did you mean '{near[0]}'?" if near else "see `workbench library list`."
        return NameNotFound(f"Nothing in the library is called '{name[:100]}'; {advice}")


def living(db: sqlite3.Connection, name: str) -> sqlite3.Row | None:
    """Return id and kind of the name that is not deleted, or None."""
    return db.execute(
        "SELECT id, kind FROM names WHERE name = ? AND deleted IS NULL", (name,)
    ).fetchone()
