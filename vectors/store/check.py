"""fsck: reads everything, says what is wrong and how to mend it, and moves damage aside.

Hashing takes all cores and runs at the hash's speed. Nothing is ever deleted: a file whose bytes
are not what its name says goes to `quarantine/`, so that a good copy can take its place.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from vectors.errors import StoreCorrupt
from vectors.formats.atomic import disk_errors, sync_folder
from vectors.store.attestations import Attestations, Row
from vectors.store.database import Database
from vectors.store.lies import lies
from vectors.store.manifests import Manifest, Manifests
from vectors.store.objects import Objects
from vectors.store.steps import step

__all__ = ["Checked", "Checker", "Fault"]

Progress = Callable[[float, str], None]
MEND = "pull it from another copy, or save its entry again"


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Args:
        kind: "damaged", "stray", "missing", "unknown", "untrue", or "database".
        what: the digest, name or path that it is about.
        words: a sentence: what is wrong, and how to mend it.
        moved: where the file is now, if it was moved aside.
    """

    kind: str
    what: str
    words: str
    moved: str = ""


@dataclass
class Checked:
    """What a check looked at and found."""

    objects: int = 0
    manifests: int = 0
    bytes: int = 0
    leftovers: int = 0
    seconds: float = 0.0
    faults: list[Fault] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong; leftovers of killed writers are no fault."""
        return not self.faults


class Checker:
    """Checks one library."""

    def __init__(
        self,
        database: Database,
        objects: Objects,
        manifests: Manifests,
        attestations: Attestations,
        quarantine: Path,
    ) -> None:
        self._database = database
        self._objects = objects
        self._manifests = manifests
        self._attestations = attestations
        self._quarantine = quarantine

    def check(self, progress: Progress = lambda share, words: None) -> Checked:
        """Look at everything.

        Raises:
            OutOfSpace: damage that cannot be moved aside.
        """
        found, start = Checked(), time.monotonic()
        self._hash(found, progress)
        good = self._read_manifests(found)
        self._closure(found, good)
        self._tables(found)
        for folder in (self._objects, self._manifests):
            found.leftovers += sum(1 for _ in folder.leftovers())
        found.seconds = time.monotonic() - start
        return found

    def _hash(self, found: Checked, progress: Progress) -> None:
        work = [(self._objects, row) for row in self._objects.scan()]
        work += [(self._manifests, row) for row in self._manifests.scan()]
        total = sum(state.st_size for _, (_, state) in work) or 1
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            hashes = pool.map(_digest, [path for _, (path, _) in work])
            for (folder, (path, state)), digest in zip(work, hashes, strict=True):
                found.bytes += state.st_size
                progress(found.bytes / total, f"checking {folder.what}s")
                if folder is self._objects:
                    found.objects += 1
                else:
                    found.manifests += 1
                if not digest or path != folder.root / folder.place(path.stem):
                    self._stray(found, folder, path)
                elif digest != path.stem:
                    self._damaged(found, folder, path)

    def _stray(self, found: Checked, folder: Objects, path: Path) -> None:
        if not path.exists():
            return  # a writer renamed it meanwhile
        words = (
            f"{path} is no {folder.what} of the library, or cannot be read; it was moved aside, "
            "and can be removed if nobody misses it."
        )
        found.faults.append(Fault("stray", str(path), words, self._aside(folder, path)))

    def _damaged(self, found: Checked, folder: Objects, path: Path) -> None:
        moved = self._aside(folder, path)
        if _digest(Path(moved)) == path.stem:
            # Somebody saved it anew between the look and the move.
            Path(moved).replace(path)
            return
        words = (
            f"The {folder.what} {path.stem[:12]} has bytes that are not what its name says; it was "
            f"moved aside, so {MEND}."
        )
        found.faults.append(Fault("damaged", path.stem, words, moved))

    def _aside(self, folder: Objects, path: Path) -> str:
        home = self._quarantine / f"{folder.what}s"
        with disk_errors(home):
            home.mkdir(parents=True, exist_ok=True)
            target, number = home / path.name, 1
            while target.exists():
                number += 1
                target = home / f"{path.name}.{number}"
            path.rename(target)
            step("moved aside")
            sync_folder(home)
            sync_folder(path.parent)
        return str(target)

    def _read_manifests(self, found: Checked) -> dict[str, Manifest]:
        good = {}
        for path, _ in self._manifests.scan():
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                continue
            try:
                good[path.stem] = Manifest.model_validate_json(data)
            except ValidationError as error:
                words = (
                    f"The manifest {path.stem[:12]} is whole but has content that this version "
                    f"does not know ({error.errors()[0]['msg']}); update the workbench."
                )
                found.faults.append(Fault("unknown", path.stem, words))
        return good

    def _closure(self, found: Checked, good: dict[str, Manifest]) -> None:
        for digest, manifest in good.items():
            for needed in manifest.objects():
                if needed not in self._objects:
                    found.faults.append(_missing(f"The entry {digest[:12]}", "object", needed))
            if manifest.kind == "recipe":
                for parent in manifest.parents:
                    if parent not in self._manifests:
                        who = f"The recipe {digest[:12]}"
                        found.faults.append(_missing(who, "task vector", parent))
            for words in lies(manifest, digest, self._objects):
                found.faults.append(Fault("untrue", digest, words))

    def _tables(self, found: Checked) -> None:
        for fault in self._database_faults():
            found.faults.append(fault)

    def _database_faults(self) -> Iterator[Fault]:
        try:
            with self._database.read() as db:
                for row in db.execute("PRAGMA integrity_check").fetchall():
                    if row[0] != "ok":
                        words = (
                            f"{self._database.path} is damaged ({row[0]}); restore it from a copy "
                            "of the library."
                        )
                        yield Fault("database", str(self._database.path), words)
                refs = db.execute(
                    """SELECT names.name, refs.revision, refs.digest FROM refs
                       JOIN names ON names.id = refs.name_id WHERE names.collected IS NULL"""
                ).fetchall()
                pins = db.execute("SELECT digest FROM pins").fetchall()
                attested = db.execute(
                    "SELECT digest, kind, object, created FROM attestations"
                ).fetchall()
        except StoreCorrupt as error:
            yield Fault("database", str(self._database.path), str(error))
            return
        for row in refs:
            if row["digest"] not in self._manifests:
                what = f"{row['name']}@{row['revision']}"
                words = (
                    f"'{what}' means the manifest {row['digest'][:12]}, which is missing; {MEND}."
                )
                yield Fault("missing", what, words)
        for row in pins:
            if row["digest"] not in self._manifests:
                words = f"A pin keeps {row['digest'][:12]}, which is missing; {MEND}, or unpin it."
                yield Fault("missing", row["digest"], words)
        for row in attested:
            try:
                needed = self._attestations.needs(Row(*row))
            except StoreCorrupt as error:
                yield Fault("missing", row["object"], str(error))
                continue
            for stored in needed:
                if stored not in self._objects:
                    who = f"An attestation of {row['digest'][:12]}"
                    yield _missing(who, "object", stored)


def _missing(who: str, what: str, digest: str) -> Fault:
    words = f"{who} needs the {what} {digest[:12]}, which is missing; {MEND}."
    return Fault("missing", digest, words)


def _digest(path: Path) -> str:
    """The sha256 of a file; empty where it cannot be read."""
    try:
        with path.open("rb", buffering=0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
