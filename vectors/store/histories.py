"""What can be done with names: rename, delete, restore, revert, undo, tag, pin."""

from __future__ import annotations

from vectors.errors import InputError
from vectors.store.catalog import Catalog, Entry
from vectors.store.changes import LogRow
from vectors.store.diff import Difference, compare
from vectors.store.lineage import Lineage, lineage
from vectors.store.marks import Marks, Pin
from vectors.store.reference import parse_reference
from vectors.store.undo import last_change, undo

__all__ = ["Histories"]


class Histories(Catalog):
    """A catalog whose names can be changed; every change can be undone, and is in the log."""

    @property
    def _marks(self) -> Marks:
        return Marks(self._database)

    def rename(self, old: str, new: str) -> None:
        """Give `old`, with all its revisions, the name `new`.

        Raises:
            GrammarError: `new` is not a name.
            NameNotFound: no `old`.
            NameTaken: `new` is in use.
        """
        self._changes.rename(old, new)

    def delete(self, name: str, *, force: bool = False) -> None:
        """Hide `name` with all its revisions; what it meant stays, and `restore` brings it back.

        Raises:
            NameNotFound: no such name.
            NameTaken: it is in use, and `force` was not given.
        """
        self._changes.delete(name, force=force)

    def restore(self, name: str) -> Entry:
        """Bring back what was deleted last under `name`.

        Raises:
            NameNotFound: nothing of that name was deleted, or it has been collected since.
            NameTaken: the name is in use again.
        """
        with self._gate.shared():
            return self._entry(self._changes.restore(name))

    def revert(self, ref: str) -> Entry:
        """Make an old revision the newest again, as a revision of its own.

        `name@...` says which; `name` alone is the revision before the newest.

        Raises:
            GrammarError, NameNotFound, StoreCorrupt: see `get`.
            InputError: it is what the name means already, or there is nothing before it.
        """
        with self._gate.shared():
            name = parse_reference(ref).name
            history = self._refs.history(name)
            if "@" not in ref and len(history) == 1:
                raise InputError(f"'{name}' has one revision only, so there is nothing before it.")
            target = self.get(ref if "@" in ref else f"{name}@{history[1].revision}")
            if target.digest == history[0].digest:
                raise InputError(
                    f"'{name}@{target.revision}' is what '{name}' means already; "
                    f"see `workbench library log {name}` for the others."
                )
            words = f"to {target.revision}"
            kept = self._changes.save(
                name, target.kind, target.digest, action="revert", detail=words
            )
            return self._entry(kept)

    def last_change(self) -> LogRow | None:
        """The change that `undo` would take back, or None."""
        with self._database.read() as db:
            return last_change(db)

    def undo(self, expected: int = 0) -> LogRow:
        """Take back the last change of a name, tag or pin, and return it; again, the one before.

        `expected` is the `id` of the change that is meant, where another process may have come
        between.

        Raises:
            InputError: nothing to take back, another change than expected, or a pull.
            NameNotFound: the name was deleted or renamed meanwhile.
            NameTaken: the name that would come back is in use, or the one that would go is.
        """
        with self._gate.shared(), self._database.change() as db:
            return undo(db, expected)

    def lineage(self, ref: str, most: int = 300) -> Lineage:
        """Return what an entry comes from, all revisions of its name, and what was made of them.

        Raises:
            GrammarError, NameNotFound, StoreCorrupt: see `get`.
        """
        return lineage(self.manifests, self._refs.all(), self.get(ref).ref, most)

    def diff(self, old: str, new: str) -> Difference:
        """Compare two entries from their manifests alone; no payload is read.

        Raises:
            GrammarError, NameNotFound, StoreCorrupt: see `get`.
        """
        return compare(self.get(old), self.get(new))

    def tag(self, ref: str, tag: str, *, move: bool = False) -> Entry:
        """Let `name@tag` mean the revision that `ref` points at now.

        Raises:
            GrammarError: text that cannot be a tag.
            NameNotFound: nothing there, or an entry without a name.
            NameTaken: the tag means another revision, and `move` was not given.
        """
        with self._gate.shared():
            entry = self.get(ref)
            self._marks.tag(entry.ref, tag, move=move)
            return entry

    def untag(self, name: str, tag: str) -> None:
        """Take a tag away; the revision stays.

        Raises:
            NameNotFound: no such name or tag.
        """
        self._marks.untag(name, tag)

    def tags(self, name: str) -> dict[str, int]:
        """The tags of `name`, each with the revision that it means."""
        return self._marks.tags(name)

    def pin(self, ref: str, reason: str = "") -> Entry:
        """Keep an entry from the collector, whatever becomes of its name.

        Raises:
            GrammarError, NameNotFound, StoreCorrupt: see `get`.
        """
        with self._gate.shared():
            entry = self.get(ref)
            self._marks.pin(entry.ref, reason)
            return entry

    def unpin(self, ref: str) -> Entry:
        """Take a pin away.

        Raises:
            NameNotFound: nothing there, or not pinned.
        """
        entry = self.get(ref)
        self._marks.unpin(entry.ref)
        return entry

    def pins(self) -> list[Pin]:
        """All pins, the oldest first."""
        return self._marks.pins()
