"""Entries by name: finding them, listing them, and saving manifests under names.

    objects/<h[:2]>/<h>     immutable bytes, named by their hash
    manifests/<h>.json      what an entry is made of; <h> is the entry's identity
    quarantine/             what `fsck` moved aside
    store.db                names, revisions, log, tags, pins, leases, attestations, an index
    gate.lock               held by writers together, by the collector alone

Objects are written before manifests and manifests before names, so that a crash leaves nothing
but bytes that no name means. Knows nothing of what the kinds of entries hold.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from vectors.errors import NameNotFound, StoreCorrupt
from vectors.formats.atomic import disk_errors
from vectors.store.changes import Changes, LogRow
from vectors.store.database import Database
from vectors.store.entries import Entry, index
from vectors.store.gate import Gate
from vectors.store.leases import DAY, Leases
from vectors.store.manifests import Kind, Manifest, Manifests
from vectors.store.objects import Objects
from vectors.store.reference import parse_reference
from vectors.store.refs import Ref, Refs
from vectors.store.watch import Watch

__all__ = ["NONE", "Catalog", "Entry", "Kinds"]

NONE: Mapping[str, Any] = {}
Kinds = str | tuple[str, ...] | None
Entries = list[Entry]  # inside the class, `list` is a method
LogRows = list[LogRow]


class Catalog:
    """Names and manifests in the folder `root`, made on the first opening.

    A `ref` is a name (its newest revision), `name@3`, `name@2026-11-22` (the newest of that date
    or before, in UTC), `name@stable` (a tag), `name@<digest>`, or a digest; 8 digits of a digest
    are enough.

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
        self._gate = Gate(root)

    def get(self, ref: str, kind: Kinds = None) -> Entry:
        """Return the entry that `ref` points at.

        Raises:
            GrammarError: text that is no ref.
            NameNotFound: nothing there, or something of another kind.
            StoreCorrupt: a manifest that is missing or damaged.
        """
        entry = self._entry(self._find(ref))
        actual = entry.manifest.kind
        if actual not in _kinds(kind, actual):
            raise NameNotFound(
                f"'{ref}' is a {actual}, and a {' or '.join(_kinds(kind))} is needed here; "
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
        """Return the newest revision of every name, by name; what is damaged is listed too."""
        found = self._refs.newest()
        if any(ref.bytes is None for ref in found):
            self._reindex([ref.digest for ref in found if ref.bytes is None])
            found = self._refs.newest()
        return [self._row(ref) for ref in found if ref.kind in _kinds(kind, ref.kind)]

    def history(self, name: str) -> Entries:
        """Return all revisions of `name`, the newest first.

        Raises:
            NameNotFound: no such name.
        """
        found = self._refs.history(name)
        if any(ref.bytes is None for ref in found):
            self._reindex([ref.digest for ref in found if ref.bytes is None])
            found = self._refs.history(name)
        return [self._row(ref) for ref in found]

    def log(self, limit: int = 100) -> LogRows:
        """Return the last changes of names, tags and pins, the newest first."""
        return self._changes.log(limit)

    def lease(self, digest: str, holder: str, seconds: float = DAY) -> AbstractContextManager[None]:
        """Say that `holder` uses `digest` while the block runs, so that its names stay."""
        return self._leases.lease(digest, holder, seconds)

    def watch(self) -> Watch:
        """What tells, for little, whether names may mean something else than before."""
        return Watch(self._database.path)

    def disk_use(self, entry: Entry) -> int:
        """The bytes that an entry takes, those it shares with others included."""
        if entry.bytes is not None:
            return entry.bytes
        return self._size(entry.digest, entry.manifest)

    def total_use(self) -> int:
        """The bytes that all objects and manifests take."""
        return self.objects.total() + self.manifests.total()

    def _size(self, digest: str, manifest: Manifest) -> int:
        return self.manifests.size(digest) + sum(map(self.objects.size, manifest.objects()))

    def _reindex(self, digests: Iterable[str]) -> None:
        """Note again what lists show, where a name came here without it."""
        with self._database.change() as db:
            for digest in dict.fromkeys(digests):
                with suppress(StoreCorrupt):
                    manifest = self.manifests.get(digest)
                    index(db, digest, manifest, self._size(digest, manifest))

    def _find(self, ref: str) -> Ref:
        reference = parse_reference(ref)
        found = self._refs.find(reference)
        if found is None:
            digest = self.manifests.find(ref)
            if digest is None:
                raise self._refs.not_found(reference.name)
            found = self._refs.of_digest(digest) or Ref(digest[:12], "", 0, digest, "")
        return found

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
        size = self._size(digest, manifest)

        def note(db: sqlite3.Connection) -> None:
            index(db, digest, manifest, size)

        return self._entry(self._changes.save(name, manifest.kind, digest, also=note))

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

    def _row(self, ref: Ref) -> Entry:
        """An entry whose manifest is read when it is asked for."""
        facts = (ref.name, ref.kind, ref.revision, ref.digest, ref.base or None, ref.created)
        return Entry(*facts, self._read, ref.bytes)

    def _entry(self, ref: Ref) -> Entry:
        """An entry whose manifest has been read, and so is known to be there."""
        manifest = self._read(ref)
        kind, base = manifest.kind, manifest.base
        entry = Entry(ref.name, kind, ref.revision, ref.digest, base, ref.created, self._read)
        entry.__dict__["manifest"] = manifest  # where `cached_property` keeps it
        return entry

    def _read(self, ref: Ref) -> Manifest:
        try:
            return self.manifests.get(ref.digest)
        except StoreCorrupt as error:
            raise StoreCorrupt(f"'{ref.name}@{ref.revision}': {error}") from error


def _kinds(kind: Kinds, otherwise: str = "") -> tuple[str, ...]:
    if kind is None:
        return (otherwise,)
    return (kind,) if isinstance(kind, str) else kind
