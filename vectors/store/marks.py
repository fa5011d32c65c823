"""Tags and pins: a tag names a revision of a name, a pin keeps an entry from the collector."""

from __future__ import annotations

from dataclasses import dataclass

from vectors.errors import NameNotFound, NameTaken
from vectors.store.changes import living_or_gone, write_log
from vectors.store.database import Database, now
from vectors.store.reference import check_tag
from vectors.store.refs import Ref

__all__ = ["Marks", "Pin"]


@dataclass(frozen=True)
class Pin:
    """An entry that stays, why, and since when."""

    digest: str
    reason: str
    created: str


class Marks:
    """The tags and pins in `database`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def tag(self, ref: Ref, tag: str, *, move: bool = False) -> None:
        """Let `name@tag` mean the revision `ref`.

        Raises:
            GrammarError: text that cannot be a tag.
            NameNotFound: an entry without a name, or one renamed meanwhile.
            NameTaken: the tag means another revision, and `move` was not given.
        """
        check_tag(tag)
        if not ref.revision:
            raise NameNotFound(
                f"{ref.digest[:12]} has no name, and a tag belongs to a name; pin it instead."
            )
        with self._database.change() as db:
            row = living_or_gone(db, ref.name)
            found = db.execute(
                "SELECT revision FROM tags WHERE name_id = ? AND tag = ?", (row["id"], tag)
            ).fetchone()
            if found is not None and found["revision"] != ref.revision and not move:
                raise NameTaken(
                    f"'{ref.name}@{tag}' is revision {found['revision']}; "
                    "move the tag expressly, or choose another."
                )
            db.execute(
                "INSERT OR REPLACE INTO tags VALUES (?, ?, ?, ?)",
                (row["id"], tag, ref.revision, now()),
            )
            write_log(db, "tag", ref, tag, name_id=row["id"])

    def untag(self, name: str, tag: str) -> None:
        """Take a tag away; the revision stays.

        Raises:
            NameNotFound: no such name or tag.
        """
        with self._database.change() as db:
            row = db.execute(
                """SELECT names.id, names.kind, tags.revision, refs.digest FROM tags
                   JOIN names ON names.id = tags.name_id
                   JOIN refs ON refs.name_id = names.id AND refs.revision = tags.revision
                   WHERE names.name = ? AND names.deleted IS NULL AND tags.tag = ?""",
                (name, tag),
            ).fetchone()
            if row is None:
                raise NameNotFound(
                    f"There is no tag '{name[:100]}@{tag[:60]}'; "
                    "see `workbench library show` for an entry's tags."
                )
            db.execute("DELETE FROM tags WHERE name_id = ? AND tag = ?", (row["id"], tag))
            ref = Ref(name, row["kind"], row["revision"], row["digest"], "")
            write_log(db, "untag", ref, tag, name_id=row["id"])

    def tags(self, name: str) -> dict[str, int]:
        """The tags of `name`, each with its revision, by tag."""
        with self._database.read() as db:
            rows = db.execute(
                """SELECT tags.tag, tags.revision FROM tags JOIN names ON names.id = tags.name_id
                   WHERE names.name = ? AND names.deleted IS NULL ORDER BY tags.tag""",
                (name,),
            ).fetchall()
        return {row["tag"]: row["revision"] for row in rows}

    def pin(self, ref: Ref, reason: str) -> None:
        """Keep what `ref` means, whatever becomes of its name; a second pin renews the reason."""
        with self._database.change() as db:
            db.execute("INSERT OR REPLACE INTO pins VALUES (?, ?, ?)", (ref.digest, reason, now()))
            write_log(db, "pin", ref, reason)

    def unpin(self, ref: Ref) -> None:
        """Take a pin away.

        Raises:
            NameNotFound: it was not pinned.
        """
        with self._database.change() as db:
            if not db.execute("DELETE FROM pins WHERE digest = ?", (ref.digest,)).rowcount:
                raise NameNotFound(
                    f"'{ref.name}' ({ref.digest[:12]}) is not pinned; nothing was changed."
                )
            write_log(db, "unpin", ref)

    def pins(self) -> list[Pin]:
        """All pins, the oldest first."""
        with self._database.read() as db:
            rows = db.execute(
                "SELECT digest, reason, created FROM pins ORDER BY created"
            ).fetchall()
        return [Pin(*row) for row in rows]
