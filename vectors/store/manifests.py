"""What an entry is made of, as canonical JSON whose hash is the entry's identity.

No times and no measurements stand here: when a name came to mean a manifest is the refs' business,
and what was found out about it later is an attestation's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, ValidationError

from vectors.errors import InputError, NameNotFound, StoreCorrupt
from vectors.formats.canonical import canonical_json, sha256
from vectors.store.objects import Objects

__all__ = ["Kind", "Manifest", "Manifests", "TensorPart"]

Kind = Literal["steering-vector", "task-vector", "recipe", "verdict", "contrast-set"]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# Attachments become file names when an entry is exported, so nothing here can leave a folder.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Count = Annotated[int, Field(ge=0)]

PREFIX = re.compile(r"[0-9a-f]{8,64}")


class TensorPart(BaseModel):
    """One changed tensor of a task vector.

    Args:
        hash: the object that holds the payload.
        shape, dtype: of the tensor; dtypes are spelt as in safetensors files.
        encoding: "xor": zstd of the byte planes of base XOR tuned (`vectors.tasks.delta`).
        content: sha256 of the tuned tensor's own bytes, so that restoring proves itself.
        norm: Frobenius norm of the delta, null if it is not finite.
        changed: how many elements differ.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    hash: Digest
    shape: tuple[Count, ...]
    dtype: str
    encoding: Literal["xor"]
    content: Digest
    norm: Annotated[FiniteFloat, Field(ge=0)] | None
    changed: Annotated[int, Field(ge=1)]


NO_TENSORS: Mapping[str, TensorPart] = {}


class Manifest(BaseModel):
    """Everything that makes an entry what it is; its canonical JSON is hashed to its digest."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    version: Literal[1] = Field(1, alias="schema")
    kind: Kind
    base: Digest | None = None
    parents: tuple[Digest, ...] = ()
    tensors: dict[Annotated[str, Field(min_length=1, max_length=500)], TensorPart] = {}
    files: dict[FileName, Digest] = {}
    info: dict[str, JsonValue] = {}

    @classmethod
    def of(
        cls,
        *,
        kind: Kind,
        base: str | None,
        parents: tuple[str, ...] = (),
        tensors: Mapping[str, TensorPart] = NO_TENSORS,
        files: Mapping[str, str],
        info: Mapping[str, Any],
    ) -> Manifest:
        """Return the manifest of a new entry.

        Raises:
            InputError: a base, parent, file name or information that a manifest cannot have.
        """
        try:
            made = cls.model_validate(
                {
                    "kind": kind,
                    "base": base,
                    "parents": parents,
                    "tensors": tensors,
                    "files": files,
                    # Through JSON and back: what is kept is what will be read, tuples as lists.
                    "info": json.loads(canonical_json(dict(info), "The entry's information")),
                }
            )
            # What cannot be read again, such as lists in lists without end, is not begun.
            cls.model_validate_json(made.to_json())
            return made
        except ValidationError as error:
            row = error.errors(include_url=False)[0]
            raise InputError(
                f"The {kind} cannot be kept, since {'.'.join(map(str, row['loc']))} is "
                f"{str(row['input'])[:80]!r} ({row['msg']}); bases and parents are digests of 64 "
                "hex digits, and attachments plain file names."
            ) from error

    def to_json(self) -> bytes:
        """The manifest as canonical JSON."""
        return canonical_json(self.model_dump(mode="json", by_alias=True), "The manifest")

    def objects(self) -> tuple[str, ...]:
        """The digests of all objects that the entry needs, each once."""
        return tuple(sorted({t.hash for t in self.tensors.values()} | set(self.files.values())))


class Manifests(Objects):
    """A folder of manifests, `<digest>.json`."""

    what = "manifest"

    def place(self, digest: str) -> str:
        """The path inside the root."""
        return f"{digest}.json"

    def put(self, manifest: Manifest) -> str:
        """Keep a manifest and return its digest.

        Raises:
            InputError: information that JSON cannot carry.
            OutOfSpace: no space, or a folder that cannot be written.
        """
        return self.write(manifest.to_json())

    def get(self, digest: str) -> Manifest:
        """Return the manifest of `digest`.

        Raises:
            NameNotFound: text that is not a digest.
            StoreCorrupt: missing, damaged, or written by a newer version.
        """
        return self.parse(digest, self.read(digest))

    def parse(self, digest: str, data: bytes) -> Manifest:
        """Return the manifest of `digest` from its bytes, wherever they came from.

        Raises:
            StoreCorrupt: other bytes than the digest says, or content of a newer version.
        """
        if sha256(data) != digest:
            raise StoreCorrupt(
                f"The manifest {digest[:12]} arrived with other bytes than its name says; "
                "fetch it again, or from another copy."
            )
        try:
            return Manifest.model_validate_json(data)
        except ValidationError as error:
            raise StoreCorrupt(
                f"The manifest {digest[:12]} in {self.root} has content that this version does not "
                f"know ({error.errors()[0]['msg']}); update the workbench."
            ) from error

    def find(self, prefix: str) -> str | None:
        """Return the one digest that starts with `prefix`, or None where there is none.

        Raises:
            NameNotFound: several digests start like this.
        """
        if not PREFIX.fullmatch(prefix):
            return None
        found = sorted(path.stem for path in self.root.glob(f"{prefix}*.json"))
        if len(found) > 1:
            raise NameNotFound(
                f"{len(found)} entries have a digest that starts with {prefix}; give more digits."
            )
        return found[0] if found else None
