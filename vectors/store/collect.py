"""The collector: removes what nothing means any more, and is older than a grace period.

It marks from names, the log, pins and leases (`reach.py`), and spares whatever is young, since
something may be about to name it. The sweep goes the other way round than a commit: names, then
manifests, then objects, so that a collector that is killed leaves garbage and no holes.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from vectors.errors import InputError, StoreCorrupt
from vectors.formats.atomic import disk_errors, sync_folder
from vectors.store.attestations import Attestations
from vectors.store.database import Database, now
from vectors.store.gate import Gate
from vectors.store.leases import DAY
from vectors.store.manifests import Manifest, Manifests
from vectors.store.objects import DIGEST, Objects
from vectors.store.reach import Reach, closure, roots
from vectors.store.steps import step

__all__ = ["GRACE", "RETENTION", "Collection", "Collector"]

RETENTION = 90 * DAY  # a deleted name and a logged change keep what they mean for so long
GRACE = 14 * DAY  # what is younger stays, whoever means it
MINUTE = 60.0


@dataclass(frozen=True)
class Collection:
    """What was collected, or would be.

    Args:
        names: deleted names that cannot be restored any more.
        manifests, objects: digests.
        leftovers: how many half-written files of killed writers.
        bytes: what all of them take.
        dry_run: whether nothing was touched.
    """

    names: tuple[str, ...]
    manifests: tuple[str, ...]
    objects: tuple[str, ...]
    leftovers: int
    bytes: int
    dry_run: bool


@dataclass(frozen=True)
class _Plan:
    names: dict[int, str]
    reach: Reach
    manifests: dict[str, Path]
    objects: dict[str, Path]
    leftovers: list[Path]
    bytes: int


class Collector:
    """Collects in one library."""

    def __init__(
        self,
        database: Database,
        objects: Objects,
        manifests: Manifests,
        attestations: Attestations,
        gate: Gate,
    ) -> None:
        self._database = database
        self._objects = objects
        self._manifests = manifests
        self._attestations = attestations
        self._gate = gate

    def collect(self, retention: float, grace: float, dry_run: bool) -> Collection:
        """Remove what nothing has meant for `retention` seconds and is `grace` seconds old.

        Raises:
            InputError: a negative time.
            StoreCorrupt: a manifest that is needed is damaged; nothing is removed.
            BackendUnavailable: something is being saved for longer than the collector waits.
        """
        for what, given in (("retention", retention), ("grace period", grace)):
            if not 0 <= given < float("inf"):
                raise InputError(f"The {what} must be a number of days from 0 on.")
        known: dict[str, Manifest] = {}
        # A first look without the gate reads the manifests, so that writers wait for the second,
        # short one only.
        plan = self._plan(retention, grace, known)
        if not dry_run:
            with self._gate.alone():
                plan = self._plan(retention, grace, known)
                self._sweep(plan)
        return Collection(
            names=tuple(sorted(plan.names.values())),
            manifests=tuple(plan.manifests),
            objects=tuple(plan.objects),
            leftovers=len(plan.leftovers),
            bytes=plan.bytes,
            dry_run=dry_run,
        )

    def _plan(self, retention: float, grace: float, known: dict[str, Manifest]) -> _Plan:
        since, before = _ago(retention), time.time() - grace
        kept = {p.stem: state for p, state in self._manifests.scan() if DIGEST.fullmatch(p.stem)}
        with self._database.read() as db:
            rooted = roots(db, since)
            names = {
                row["id"]: row["name"]
                for row in db.execute(
                    "SELECT id, name FROM names WHERE deleted < ? AND collected IS NULL", (since,)
                )
            }
        # A young manifest without a name is somebody's work: it keeps all that it needs.
        young = {digest for digest, state in kept.items() if state.st_mtime > before}
        try:
            needed = rooted.needed | young
            reach = closure(
                needed, self._manifests, self._attestations, known, if_there=rooted.logged
            )
        except StoreCorrupt as error:
            # What it needs cannot be told from what nobody needs.
            raise StoreCorrupt(f"Nothing is collected before this is mended: {error}") from error
        manifests = {d: self._manifests.path(d) for d in kept if d not in reach.manifests}
        size = sum(kept[digest].st_size for digest in manifests)
        objects: dict[str, Path] = {}
        for path, state in self._objects.scan():
            if DIGEST.fullmatch(path.name) is None or path.name in reach.objects:
                continue
            if state.st_mtime <= before:
                objects[path.name] = path
                size += state.st_size
        leftovers = []
        for folder in (self._objects, self._manifests):
            for path, state in folder.leftovers():
                # Its writer may hold it open at this moment, so it gets a minute in any case.
                if state.st_mtime <= min(before, time.time() - MINUTE):
                    leftovers.append(path)
                    size += state.st_size
        return _Plan(names, reach, manifests, objects, leftovers, size)

    def _sweep(self, plan: _Plan) -> None:
        with self._database.change() as db:
            for name_id in plan.names:
                db.execute("UPDATE names SET collected = ? WHERE id = ?", (now(), name_id))
                step("name collected")
            db.execute("DELETE FROM leases WHERE expires < ?", (time.time(),))
            for table in ("attestations", "entries"):
                _forget(db, table, plan.manifests)
        with disk_errors(self._objects.root):
            for paths in (plan.manifests.values(), plan.objects.values(), plan.leftovers):
                _unlink(paths)


def _forget(db: sqlite3.Connection, table: str, digests: Iterable[str]) -> None:
    db.executemany(f"DELETE FROM {table} WHERE digest = ?", [(digest,) for digest in digests])
    step("rows deleted")


def _unlink(paths: Iterable[Path]) -> None:
    folders: dict[Path, None] = {}
    for path in paths:
        path.unlink(missing_ok=True)
        folders[path.parent] = None
        step("file removed")
    for folder in folders:
        sync_folder(folder)
        step("folder synced")


def _ago(seconds: float) -> str:
    when = datetime.fromtimestamp(max(0.0, time.time() - seconds), UTC)
    return when.isoformat(timespec="milliseconds")
