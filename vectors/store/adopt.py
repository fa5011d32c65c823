"""Names that came from elsewhere, with the revisions and times that they have there."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vectors.errors import NameTaken
from vectors.store.catalog import Catalog
from vectors.store.changes import check_kind, insert_name, write_log
from vectors.store.database import Database, now
from vectors.store.reference import check_tag
from vectors.store.refs import Ref, living

__all__ = ["Adopted", "adopt", "check_adoption"]

Revision = tuple[int, str, str]


@dataclass(frozen=True)
class Adopted:
    """A history to be taken over; revisions are number, digest and time, the oldest first."""

    name: str
    kind: str
    revisions: Sequence[Revision]
    tags: Mapping[str, int]


def check_adoption(catalog: Catalog, name: str, kind: str, revisions: Sequence[Revision]) -> None:
    """Refuse a history that `name` cannot have here, before anything is fetched for it.

    Raises:
        NameTaken: the name is another kind's, or its revisions meant something else here.
    """
    with catalog._database.read() as db:
        check_kind(living(db, name), name, kind)
        _check_past(db, name, revisions)


def adopt(catalog: Catalog, adopted: Adopted, origin: str) -> None:
    """Give a name the revisions that it lacks, in one transaction.

    Raises:
        NameTaken: see `check_adoption`; the name may have moved since.
    """
    database: Database = catalog._database
    with database.change() as db:
        row = living(db, adopted.name)
        check_kind(row, adopted.name, adopted.kind)
        _check_past(db, adopted.name, adopted.revisions)
        name_id = row["id"] if row is not None else insert_name(db, adopted.name, adopted.kind)
        newest = None
        for number, digest, created in adopted.revisions:
            added = db.execute(
                "INSERT OR IGNORE INTO refs VALUES (?, ?, ?, ?)", (name_id, number, digest, created)
            ).rowcount
            if added:
                newest = Ref(adopted.name, adopted.kind, number, digest, created)
        digests = {number: digest for number, digest, _ in adopted.revisions}
        for tag, number in adopted.tags.items():
            if number not in digests:
                continue
            added = db.execute(
                "INSERT OR IGNORE INTO tags VALUES (?, ?, ?, ?)",
                (name_id, check_tag(tag), number, now()),
            ).rowcount
            if added:
                # Logged before the pull, so that undoing a later move finds where the tag was.
                ref = Ref(adopted.name, adopted.kind, number, digests[number], "")
                write_log(db, "tag", ref, tag, name_id=name_id)
        if newest is not None:
            write_log(db, "pull", newest, f"from {origin}", name_id=name_id)


def _check_past(db: sqlite3.Connection, name: str, revisions: Sequence[Revision]) -> None:
    """A revision that a name once had here keeps its meaning, deleted or not."""
    rows = db.execute(
        """SELECT refs.revision, refs.digest, names.deleted FROM refs
           JOIN names ON names.id = refs.name_id WHERE names.name = ?""",
        (name,),
    ).fetchall()
    past = {number: digest for number, digest, _ in revisions}
    for row in rows:
        if past.get(row["revision"], row["digest"]) != row["digest"]:
            words = "was deleted here, and" if row["deleted"] else "here"
            raise NameTaken(
                f"'{name}' {words} had another revision {row['revision']}; "
                "pull it under another name."
            )
