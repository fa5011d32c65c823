"""How names change: save, revert, rename, delete, restore; each one transaction, one log row.

A delete hides the name without touching what it stood for, and a name used again goes on
counting: `cheerful@1` never comes to mean something else by it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from vectors.errors import NameNotFound, NameTaken
from vectors.store.database import Database, now
from vectors.store.leases import holders
from vectors.store.reference import check_new_name
from vectors.store.refs import NEWEST, SELECT, Ref, Refs, living

__all__ = [
    "LOG",
    "Changes",
    "LogRow",
    "check_kind",
    "insert_name",
    "last_revision",
    "living_or_gone",
    "write_log",
]

LOG = "SELECT created, action, name, revision, digest, detail, id, name_id, undoes FROM reflog"


@dataclass(frozen=True)
class LogRow:
    """One change of the library, such as save, revert, tag, rename, delete or pull.

    `name_id` is the history that was changed, whatever it is called by now (None for pins, and in
    rows of older versions), and `undoes` the `id` of the change that this one took back, or None.
    """

    created: str
    action: str
    name: str
    revision: int
    digest: str
    detail: str
    id: int
    name_id: int | None = None
    undoes: int | None = None


class Changes:
    """Changes names in `database`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._refs = Refs(database)

    def check_free(self, name: str, kind: str) -> None:
        """Refuse a name that cannot get a revision of this kind, before any work is done for it.

        Raises:
            GrammarError: not a name.
            NameTaken: the name belongs to another kind.
        """
        check_new_name(name)
        with self._database.read() as db:
            check_kind(living(db, name), name, kind)

    def save(
        self,
        name: str,
        kind: str,
        digest: str,
        *,
        action: str = "save",
        detail: str = "",
        also: Callable[[sqlite3.Connection], None] = lambda db: None,
    ) -> Ref:
        """Make `digest` the newest revision of `name`; `also` runs in the same transaction.

        Raises:
            GrammarError, NameTaken: see `check_free`.
        """
        check_new_name(name)
        with self._database.change() as db:
            row = living(db, name)
            check_kind(row, name, kind)
            name_id = row["id"] if row is not None else insert_name(db, name, kind)
            ref = Ref(name, kind, last_revision(db, name) + 1, digest, now())
            db.execute(
                "INSERT INTO refs VALUES (?, ?, ?, ?)", (name_id, ref.revision, digest, ref.created)
            )
            write_log(db, action, ref, detail, name_id=name_id)
            also(db)
        return ref

    def rename(self, old: str, new: str) -> None:
        """Give `old` with all its revisions the name `new`.

        Raises:
            GrammarError: `new` is not a name.
            NameNotFound: no `old`.
            NameTaken: `new` is in use.
        """
        check_new_name(new)
        newest = self._refs.history(old)[0]
        with self._database.change() as db:
            row = living_or_gone(db, old)
            if living(db, new) is not None:
                raise NameTaken(f"The name '{new}' is in use; choose another, or delete it first.")
            db.execute("UPDATE names SET name = ? WHERE id = ?", (new, row["id"]))
            write_log(db, "rename", newest, f"to {new}", name_id=row["id"])

    def delete(self, name: str, *, force: bool = False) -> None:
        """Hide `name` and all its revisions; the objects stay, and `restore` brings them back.

        Raises:
            NameNotFound: no such name.
            NameTaken: something uses one of its revisions, and `force` was not given.
        """
        revisions = self._refs.history(name)
        with self._database.change() as db:
            row = living_or_gone(db, name)
            users = holders(db, [ref.digest for ref in revisions])
            if users and not force:
                raise NameTaken(
                    f"'{name}' is in use by {', '.join(users)}; stop it first, or delete by force."
                )
            db.execute("UPDATE names SET deleted = ? WHERE id = ?", (now(), row["id"]))
            write_log(db, "delete", revisions[0], name_id=row["id"])

    def restore(self, name: str) -> Ref:
        """Bring back what was deleted last under `name`.

        Raises:
            NameNotFound: nothing of that name was deleted.
            NameTaken: the name is in use again.
        """
        with self._database.change() as db:
            row = db.execute(
                """SELECT id FROM names WHERE name = ? AND deleted IS NOT NULL
                   AND collected IS NULL ORDER BY deleted DESC, id DESC LIMIT 1""",
                (name,),
            ).fetchone()
            if row is None:
                raise NameNotFound(
                    f"Nothing called '{name[:100]}' was deleted; see `workbench library log`."
                )
            if living(db, name) is not None:
                raise NameTaken(
                    f"The name '{name}' is in use again; rename the present one, then restore."
                )
            db.execute("UPDATE names SET deleted = NULL WHERE id = ?", (row["id"],))
            ref = Ref(*db.execute(f"{SELECT} AND names.id = ? {NEWEST}", (row["id"],)).fetchone())
            write_log(db, "restore", ref, name_id=row["id"])
        return ref

    def log(self, limit: int) -> list[LogRow]:
        """Return the last changes, the newest first."""
        with self._database.read() as db:
            rows = db.execute(f"{LOG} ORDER BY id DESC LIMIT ?", (limit,)).fetchall()
        return [LogRow(*row) for row in rows]


def check_kind(row: sqlite3.Row | None, name: str, kind: str) -> None:
    """Raise NameTaken where the name, as `living` found it, belongs to another kind."""
    if row is not None and row["kind"] != kind:
        raise NameTaken(
            f"The name '{name}' belongs to a {row['kind']}, and this is a {kind}; "
            "choose another name."
        )


def living_or_gone(db: sqlite3.Connection, name: str) -> sqlite3.Row:
    """Return id and kind of a name that was there a moment ago.

    Raises:
        NameNotFound: it is there no more.
    """
    row = living(db, name)
    if row is None:
        raise NameNotFound(f"'{name}' was deleted or renamed meanwhile; look again.")
    return row


def last_revision(db: sqlite3.Connection, name: str) -> int:
    """The highest number that a revision of `name` ever had, deleted ones included."""
    return db.execute(
        """SELECT coalesce(max(refs.revision), 0) FROM refs
           JOIN names ON names.id = refs.name_id WHERE names.name = ?""",
        (name,),
    ).fetchone()[0]


def insert_name(db: sqlite3.Connection, name: str, kind: str) -> int | None:
    """Begin a new history under `name`."""
    return db.execute("INSERT INTO names (name, kind) VALUES (?, ?)", (name, kind)).lastrowid


def write_log(
    db: sqlite3.Connection,
    action: str,
    ref: Ref,
    detail: str = "",
    *,
    name_id: int | None = None,
    undoes: int | None = None,
) -> None:
    """Add a row to the log of changes; see `LogRow`."""
    db.execute(
        """INSERT INTO reflog (created, action, name, revision, digest, detail, name_id, undoes)
           VALUES (?, ?, ?, ?, ?, ?, ?, ?)""",
        (now(), action, ref.name, ref.revision, ref.digest, detail, name_id, undoes),
    )
