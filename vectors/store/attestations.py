"""What was found out about an entry; it stands beside the entry and never changes its identity."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from vectors.errors import StoreCorrupt
from vectors.formats.canonical import canonical_json
from vectors.grammar import check_name
from vectors.store.database import Database, now
from vectors.store.manifests import Digest, FileName
from vectors.store.objects import Objects

__all__ = ["Attestations", "Row"]


class _Attestation(BaseModel):
    """What the object of an attestation holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: Digest
    kind: str
    payload: dict[str, JsonValue]
    files: dict[FileName, Digest] = {}


@dataclass(frozen=True)
class Row:
    """That the object `object` attests something to the entry `digest`."""

    digest: str
    kind: str
    object: str
    created: str

    @property
    def key(self) -> str:
        """Its place in a remote."""
        return f"attestations/{self.digest}/{self.object}.json"


class Attestations:
    """The attestations in `database`, with their content in `objects`."""

    def __init__(self, database: Database, objects: Objects) -> None:
        self._database = database
        self._objects = objects

    def add(self, digest: str, kind: str, payload: dict[str, Any], files: dict[str, str]) -> None:
        """Keep one more attestation of `digest`.

        Raises:
            GrammarError: a kind that is not a name.
            InputError: a payload that JSON cannot carry.
        """
        check_name(kind, "kind of attestation")
        body = {"digest": digest, "kind": kind, "payload": payload, "files": files}
        stored = self._objects.write(canonical_json(body, f"The {kind}"))
        with self._database.change() as db:
            db.execute(
                """INSERT INTO attestations (digest, kind, object, created, passed)
                   VALUES (?, ?, ?, ?, ?)""",
                (digest, kind, stored, now(), _passed(payload)),
            )

    def of(self, digest: str, kind: str | None) -> list[dict[str, Any]]:
        """Return the payloads about `digest`, the oldest first, each with a key `attested`.

        `attested` holds kind, created, object, and files (name to object digest).

        Raises:
            StoreCorrupt: one that is missing, damaged, or written by a newer version.
        """
        with self._database.read() as db:
            rows = db.execute(
                """SELECT kind, object, created FROM attestations
                   WHERE digest = ?1 AND (?2 IS NULL OR kind = ?2) ORDER BY id""",
                (digest, kind),
            ).fetchall()
        found = []
        for row in rows:
            body = self._read(row["object"])
            found.append({**body.payload, "attested": {**dict(row), "files": dict(body.files)}})
        return found

    def passed(self, kind: str) -> dict[str, bool]:
        """Whether the newest attestation of `kind` on each entry says `passed`, by digest."""
        with self._database.read() as db:
            rows = db.execute(
                """SELECT digest, passed, object FROM attestations WHERE id IN
                   (SELECT max(id) FROM attestations WHERE kind = ? GROUP BY digest)""",
                (kind,),
            ).fetchall()
        found = {}
        for row in rows:
            # A library of version 1 has not noted it beside the object.
            noted = row["passed"]
            said = _passed(self._read(row["object"]).payload) if noted is None else bool(noted)
            if said is not None:
                found[row["digest"]] = said
        return found

    def objects(self, digests: Container[str]) -> set[str]:
        """The objects that hold the attestations of `digests`, with their files.

        Raises:
            StoreCorrupt: one that is missing or damaged.
        """
        with self._database.read() as db:
            rows = db.execute("SELECT digest, object FROM attestations").fetchall()
        found = {row["object"] for row in rows if row["digest"] in digests}
        return found | {stored for o in found for stored in self.needs(o)}

    def needs(self, stored: str, about: str = "") -> tuple[str, ...]:
        """The objects that the attestation in the object `stored` has as files.

        Raises:
            StoreCorrupt: one that is missing, damaged, written by a newer version, or not about
                the entry `about`, where that is given.
        """
        found = self._read(stored)
        if about and found.digest != about:
            raise StoreCorrupt(
                f"The attestation {stored[:12]} is about {found.digest[:12]}, and was given for "
                f"{about[:12]}; attest that entry again."
            )
        return tuple(found.files.values())

    def rows(self, digests: Container[str]) -> list[Row]:
        """The attestations of `digests`, the oldest first, each object once."""
        with self._database.read() as db:
            rows = db.execute(
                "SELECT digest, kind, object, min(created) AS created FROM attestations "
                "GROUP BY digest, object ORDER BY min(id)"
            ).fetchall()
        return [Row(*row) for row in rows if row["digest"] in digests]

    def adopt(self, rows: Iterable[Row]) -> int:
        """Take over attestations whose objects are here; return how many were new."""
        added = 0
        for row in sorted(rows, key=lambda row: row.created):
            passed = _passed(self._read(row.object).payload)
            with self._database.change() as db:
                added += db.execute(
                    """INSERT INTO attestations (digest, kind, object, created, passed)
                       SELECT ?1, ?2, ?3, ?4, ?5 WHERE NOT EXISTS
                       (SELECT 1 FROM attestations WHERE digest = ?1 AND object = ?3)""",
                    (row.digest, row.kind, row.object, row.created, passed),
                ).rowcount
        return added

    def _read(self, stored: str) -> _Attestation:
        try:
            return _Attestation.model_validate_json(self._objects.read(stored))
        except ValidationError as error:
            raise StoreCorrupt(
                f"The attestation {stored[:12]} has content that this version does not know; "
                "update the workbench."
            ) from error


def _passed(payload: Mapping[str, Any]) -> bool | None:
    found = payload.get("passed")
    return found if isinstance(found, bool) else None
