"""What was found out about an entry; it stands beside the entry and never changes its identity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from vectors.errors import StoreCorrupt
from vectors.formats.canonical import canonical_json
from vectors.grammar import check_name
from vectors.store.database import Database, now
from vectors.store.manifests import Digest, FileName
from vectors.store.objects import Objects

__all__ = ["Attestations"]


class _Attestation(BaseModel):
    """What the object of an attestation holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: Digest
    kind: str
    payload: dict[str, JsonValue]
    files: dict[FileName, Digest] = {}


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
