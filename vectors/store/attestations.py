"""What was found out about an entry; it stands beside the entry and never changes its identity."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from vectors.errors import InputError, StoreCorrupt
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
        data = canonical_json(body, f"The {kind}")
        try:
            _Attestation.model_validate_json(data)
        except ValidationError as error:
            raise InputError(
                f"The {kind} could not be read again ({error.errors()[0]['msg']}); nest it less deeply."
            ) from error
        stored = self._objects.write(data)
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
                   WHERE digest = ?1 AND (?2 IS NULL OR kind = ?2) ORDER BY created, id""",
                (digest, kind),
            ).fetchall()
        found = []
        for row in rows:
            body = self._read(Row(digest, *row))
            found.append({**body.payload, "attested": {**dict(row), "files": dict(body.files)}})
        return found

    def passed(self, kind: str) -> dict[str, bool]:
        """Whether the newest attestation of `kind` on each entry says `passed`, by digest."""
        with self._database.read() as db:
            rows = db.execute(
                """SELECT digest, kind, object, created, passed FROM
                   (SELECT *, row_number() OVER (PARTITION BY digest ORDER BY created DESC, id DESC)
                    AS newest FROM attestations WHERE kind = ?) WHERE newest = 1""",
                (kind,),
            ).fetchall()
        found = {}
        for row in rows:
            # A library of version 1 has not noted it beside the object.
            noted = row["passed"]
            said = _passed(self._read(Row(*row[:4])).payload) if noted is None else bool(noted)
            if said is not None:
                found[row["digest"]] = said
        return found

    def objects(self, digests: Container[str]) -> set[str]:
        """The objects that hold the attestations of `digests`, with their files.

        Raises:
            StoreCorrupt: one that is missing or damaged.
        """
        with self._database.read() as db:
            rows = db.execute("SELECT digest, kind, object, created FROM attestations").fetchall()
        found = [Row(*row) for row in rows if row["digest"] in digests]
        return {row.object for row in found} | {file for row in found for file in self.needs(row)}

    def needs(self, row: Row) -> tuple[str, ...]:
        """The objects that an attestation has as files.

        Raises:
            StoreCorrupt: one that is missing, damaged, written by a newer version, or of another kind or
                about another entry than the row says.
        """
        return tuple(self._read(row).files.values())

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
            passed = _passed(self._read(row).payload)
            with self._database.change() as db:
                added += db.execute(
                    """INSERT INTO attestations (digest, kind, object, created, passed)
                       SELECT ?1, ?2, ?3, ?4, ?5 WHERE NOT EXISTS
                       (SELECT 1 FROM attestations WHERE digest = ?1 AND object = ?3)""",
                    (row.digest, row.kind, row.object, row.created, passed),
                ).rowcount
        return added

    def _read(self, row: Row) -> _Attestation:
        try:
            found = _Attestation.model_validate_json(self._objects.read(row.object))
        except ValidationError as error:
            raise StoreCorrupt(
                f"The attestation {row.object[:12]} has content that this version does not know; "
                "update the workbench."
            ) from error
        if (found.digest, found.kind) != (row.digest, row.kind):
            # What stands beside the object is not signed; the object is.
            raise StoreCorrupt(
                f"The attestation {row.object[:12]} is a {found.kind} about {found.digest[:12]}, and was "
                f"given for a {row.kind} about {row.digest[:12]}; attest that entry again."
            )
        return found


def _passed(payload: Mapping[str, Any]) -> bool | None:
    found = payload.get("passed")
    return found if isinstance(found, bool) else None
