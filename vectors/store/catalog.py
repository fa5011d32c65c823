"""Entries by name: saving manifests under names, finding them, and their history.

    objects/<h[:2]>/<h>     immutable bytes, named by their hash
    manifests/<h>.json      what an entry is made of; <h> is the entry's identity
    store.db                names, revisions, log, leases, attestations

Objects are written before manifests and manifests before names, so that a crash leaves nothing
but bytes that no name means. Knows nothing of what the kinds of entries hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vectors.errors import NameNotFound, StoreCorrupt
from vectors.formats.atomic import disk_errors
from vectors.store.changes import Changes, LogRow
from vectors.store.database import Database
from vectors.store.leases import DAY, Leases
from vectors.store.manifests import Kind, Manifest, Manifests
from vectors.store.objects import Objects
from vectors.store.reference import parse_reference
from vectors.store.refs import Ref, Refs

__all__ = ["NONE", "Catalog", "Entry", "Kinds"]

NONE: Mapping[str, Any] = {}
Kinds = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Entry:
    """One revision of one name, or a manifest without a name.

    Without a name, `name` is the first 12 digits of the digest, `revision` 0 and `created` empty.
    """

    name: str
    kind: str
    revision: int
    digest: str
    base: str | None
    created: str
    info: Mapping[str, Any]
    manifest: Manifest


Entries = list[Entry]  # inside the class, `list` is a method
LogRows = list[LogRow]


class Catalog:
    """Names and manifests in the folder `root`, made on the first opening.

    A `ref` is a name (its newest revision), `name@3`, `name@2026-11-22` (the newest of that date
    or before, in UTC), `name@<digest>`, or a digest; 8 digits of a digest are enough.

    Raises:
        OutOfSpace: a folder that cannot be written.
        StoreCorrupt: a damaged library, or one of a newer version.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.objects = Objects(root / "objects")
        self.manifests = Manifests(root / "manifests")
        with disk_errors(root):
            for folder in (self.objects.root, self.manifests.root):
                folder.mkdir(parents=True, exist_ok=True)
        self._database = Database(root / "store.db")
        self._refs = Refs(self._database)
        self._changes = Changes(self._database)
        self._leases = Leases(self._database)

    def get(self, ref: str, kind: Kinds = None) -> Entry:
        """Return the entry that `ref` points at.

        Raises:
            GrammarError: text that is no ref.
            NameNotFound: nothing there, or something of another kind.
            StoreCorrupt: a manifest that is missing or damaged.
        """
        reference = parse_reference(ref)
        found = self._refs.find(reference)
        if found is None:
            digest = self.manifests.find(ref)
            if digest is None:
                raise self._refs.not_found(reference.name)
            found = self._refs.of_digest(digest) or Ref(digest[:12], "", 0, digest, "")
        entry = self._entry(found)
        if entry.kind not in _kinds(kind, entry.kind):
            raise NameNotFound(
                f"'{ref}' is a {entry.kind}, and a {' or '.join(_kinds(kind))} is needed here; "
                "see `workbench library list`."
            )
        return entry

    def read_file(self, entry: Entry, name: str) -> bytes:
        """Return an attachment of an entry.

        Raises:
            NameNotFound: the entry has no such attachment.
            StoreCorrupt: it is missing or damaged.
        """
        if name not in entry.manifest.files:
            raise NameNotFound(
                f"'{entry.name}' has no file {name[:100]!r}; "
                f"it has {', '.join(sorted(entry.manifest.files)) or 'none'}."
            )
        return self.objects.read(entry.manifest.files[name])

    def list(self, kind: Kinds = None) -> Entries:
        """Return the newest revision of every name, by name."""
        return [self._entry(r) for r in self._refs.newest() if r.kind in _kinds(kind, r.kind)]

    def history(self, name: str) -> Entries:
        """Return all revisions of `name`, the newest first.

        Raises:
            NameNotFound: no such name.
        """
        return [self._entry(ref) for ref in self._refs.history(name)]

    def log(self, limit: int = 100) -> LogRows:
        """Return the last saves, renames, deletes and restores, the newest first."""
        return self._changes.log(limit)

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
            NameNotFound: nothing of that name was deleted.
            NameTaken: the name is in use again.
        """
        return self._entry(self._changes.restore(name))

    def lease(self, digest: str, holder: str, seconds: float = DAY) -> AbstractContextManager[None]:
        """Say that `holder` uses `digest` while the block runs, so that its names stay."""
        return self._leases.lease(digest, holder, seconds)

    def disk_use(self, entry: Entry) -> int:
        """The bytes that an entry takes, those it shares with others included."""
        objects = sum(self.objects.size(digest) for digest in entry.manifest.objects())
        return objects + self.manifests.size(entry.digest)

    def total_use(self) -> int:
        """The bytes that all objects and manifests take."""
        return self.objects.total() + self.manifests.total()

    def _draft(
        self,
        kind: Kind,
        base: str,
        files: Mapping[str, bytes],
        parents: Iterable[str],
        info: Mapping[str, Any],
    ) -> Manifest:
        written = self._write_files(files)
        return Manifest.of(kind=kind, base=base, parents=tuple(parents), files=written, info=info)

    def _write_files(self, files: Mapping[str, bytes]) -> dict[str, str]:
        return {name: self.objects.write(data) for name, data in files.items()}

    def _save(self, name: str, manifest: Manifest) -> Entry:
        digest = self.manifests.put(manifest)
        return self._entry(self._changes.save(name, manifest.kind, digest))

    def _manifest(self, digest: str, kind: Kinds = None) -> Manifest:
        if digest not in self.manifests:
            raise NameNotFound(
                f"No entry of the library {self.root} has the digest {digest[:12]}; "
                "see `workbench library list`."
            )
        manifest = self.manifests.get(digest)
        if manifest.kind not in _kinds(kind, manifest.kind):
            raise NameNotFound(
                f"{digest[:12]} is a {manifest.kind}, and a {' or '.join(_kinds(kind))} is needed "
                "here; see `workbench library list`."
            )
        return manifest

    def _entry(self, ref: Ref) -> Entry:
        try:
            manifest = self.manifests.get(ref.digest)
        except StoreCorrupt as error:
            raise StoreCorrupt(f"'{ref.name}@{ref.revision}': {error}") from error
        return Entry(
            name=ref.name,
            kind=manifest.kind,
            revision=ref.revision,
            digest=ref.digest,
            base=manifest.base,
            created=ref.created,
            info=manifest.info,
            manifest=manifest,
        )


def _kinds(kind: Kinds, otherwise: str = "") -> tuple[str, ...]:
    if kind is None:
        return (otherwise,)
    return (kind,) if isinstance(kind, str) else kind
