"""Taking changes back, the latest first, each by its opposite.

The opposite is a change like any other, with a row of its own in the log that says what it undoes, so
nothing is lost: a revision that was taken back keeps its number, and a name its history.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

from vectors.errors import InputError, NameTaken
from vectors.store.changes import LOG, LogRow, write_log
from vectors.store.database import now
from vectors.store.leases import holders
from vectors.store.refs import NEWEST, SELECT, Ref, living

__all__ = ["last_change", "undo"]

# What undid something, what was undone, and what became of names that are collected, is passed over.
LAST = f"""{LOG} WHERE undoes IS NULL AND id NOT IN
           (SELECT undoes FROM reflog WHERE undoes IS NOT NULL) AND (name_id IS NULL OR name_id NOT IN
           (SELECT id FROM names WHERE collected IS NOT NULL)) ORDER BY id DESC LIMIT 1"""


def last_change(db: sqlite3.Connection) -> LogRow | None:
    """The change that `undo` would take back, or None."""
    row = db.execute(LAST).fetchone()
    return None if row is None else LogRow(*row)


def undo(db: sqlite3.Connection, expected: int = 0) -> LogRow:
    """Take back the last change inside a transaction, and return it.

    Args:
        expected: the `id` of the change that is meant; 0 is whichever is the last.

    Raises:
        InputError: nothing to take back, another change than expected, or one without an opposite.
        NameTaken: the name that would come back is in use, or the one that would go is.
    """
    row = last_change(db)
    if row is None:
        raise InputError("Nothing is left to undo; the log has no change that was not taken back.")
    if expected and row.id != expected:
        raise InputError(
            f"The last change is another one by now ({row.action} '{row.name}'); look again."
        )
    known = row.name_id is not None or row.action in ("pin", "unpin")
    if row.action not in OPPOSITES or not known:
        raise InputError(
            f"A {row.action} cannot be undone at once ('{row.name}', {row.created[:10]}); delete the "
            "name, or make an older revision the newest with `workbench library revert`."
        )
    action, ref, detail = OPPOSITES[row.action](db, row)
    write_log(db, action, ref, detail, name_id=row.name_id, undoes=row.id)
    return row


Opposite = tuple[str, Ref, str]


def _saved(db: sqlite3.Connection, row: LogRow) -> Opposite:
    """Go back to what the name meant before; a name that meant nothing is deleted."""
    newest = _newest(db, row)
    if newest.digest != row.digest:
        raise InputError(f"'{newest.name}' has changed since; see its history, and revert there.")
    before = db.execute(
        f"{SELECT} AND names.id = ? AND refs.revision < ? {NEWEST}", (row.name_id, row.revision)
    ).fetchone()
    if before is None:
        return _delete(db, row)
    old = Ref(*before)
    back = Ref(old.name, old.kind, newest.revision + 1, old.digest, now())
    db.execute(
        "INSERT INTO refs VALUES (?, ?, ?, ?)",
        (row.name_id, back.revision, back.digest, back.created),
    )
    return "revert", back, f"to {old.revision}"


def _delete(db: sqlite3.Connection, row: LogRow) -> Opposite:
    newest = _newest(db, row)
    rows = db.execute("SELECT digest FROM refs WHERE name_id = ?", (row.name_id,)).fetchall()
    users = holders(db, [found["digest"] for found in rows])
    if users:
        raise NameTaken(
            f"'{newest.name}' is in use by {', '.join(users)}; stop it first, then undo."
        )
    db.execute("UPDATE names SET deleted = ? WHERE id = ?", (now(), row.name_id))
    return "delete", newest, ""


def _deleted(db: sqlite3.Connection, row: LogRow) -> Opposite:
    _check_unused(db, row.name)
    db.execute("UPDATE names SET deleted = NULL WHERE id = ? AND collected IS NULL", (row.name_id,))
    return "restore", _newest(db, row), ""


def _renamed(db: sqlite3.Connection, row: LogRow) -> Opposite:
    _check_unused(db, row.name)
    newest = _newest(db, row)
    db.execute("UPDATE names SET name = ? WHERE id = ?", (row.name, row.name_id))
    return "rename", newest, f"to {row.name}"


def _tagged(db: sqlite3.Connection, row: LogRow) -> Opposite:
    """Give the tag back to the revision that had it, or take it away."""
    before = _before(db, row, "name_id = ? AND detail = ?", (row.name_id, row.detail), "tag")
    if before is None:
        db.execute("DELETE FROM tags WHERE name_id = ? AND tag = ?", (row.name_id, row.detail))
        return "untag", _ref(row), row.detail
    return _untagged(db, before)


def _untagged(db: sqlite3.Connection, row: LogRow) -> Opposite:
    values = (row.name_id, row.detail, row.revision, now())
    db.execute("INSERT OR REPLACE INTO tags VALUES (?, ?, ?, ?)", values)
    return "tag", _ref(row), row.detail


def _pinned(db: sqlite3.Connection, row: LogRow) -> Opposite:
    """Give the pin its former reason back, or take it away."""
    before = _before(db, row, "digest = ?", (row.digest,), "pin")
    if before is None:
        db.execute("DELETE FROM pins WHERE digest = ?", (row.digest,))
        return "unpin", _ref(row), ""
    return _pin(db, row, before.detail)


def _unpinned(db: sqlite3.Connection, row: LogRow) -> Opposite:
    before = _before(db, row, "digest = ?", (row.digest,), "pin")
    return _pin(db, row, before.detail if before else "")


def _pin(db: sqlite3.Connection, row: LogRow, reason: str) -> Opposite:
    db.execute("INSERT OR REPLACE INTO pins VALUES (?, ?, ?)", (row.digest, reason, now()))
    return "pin", _ref(row), reason


def _before(
    db: sqlite3.Connection, row: LogRow, where: str, values: tuple[object, ...], what: str
) -> LogRow | None:
    """The row that set the tag or the pin which stood before `row`, or None where none stood."""
    found = db.execute(
        f"{LOG} WHERE id < ? AND {where} AND action IN (?, ?) ORDER BY id DESC LIMIT 1",
        (row.id, *values, what, f"un{what}"),
    ).fetchone()
    return LogRow(*found) if found is not None and found["action"] == what else None


def _newest(db: sqlite3.Connection, row: LogRow) -> Ref:
    found = db.execute(f"{SELECT} AND names.id = ? {NEWEST}", (row.name_id,)).fetchone()
    if found is None:
        raise InputError(f"'{row.name}' is not there any more, and cannot come back.")
    return Ref(*found)


def _ref(row: LogRow) -> Ref:
    return Ref(row.name, "", row.revision, row.digest, "")


def _check_unused(db: sqlite3.Connection, name: str) -> None:
    if living(db, name) is not None:
        raise NameTaken(f"The name '{name}' is in use again; rename the present one, then undo.")


OPPOSITES: dict[str, Callable[[sqlite3.Connection, LogRow], Opposite]] = {
    "save": _saved,
    "revert": _saved,
    "rename": _renamed,
    "delete": _deleted,
    "restore": _delete,
    "tag": _tagged,
    "untag": _untagged,
    "pin": _pinned,
    "unpin": _unpinned,
}
