"""A steering request on its way into vLLM: parsed by the front end, read by the workers.

A client sends, in `vllm_xargs`, `steer` (terms of the grammar, or the JSON form) and `steer_id` (an
id of its own, under which the receipt is kept). The front end resolves names to digests and replaces
`steer` by the canonical JSON of a `Resolved`, which is all that the workers ever see.

    {"terms": [{"name": "cheerful", "dose": 0.2, "blocks": [15], "phase": "decode"}]}    JSON form
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vectors.errors import BlockNotFound, GrammarError, ModelMismatch
from vectors.grammar import SteerTerm, check_dose, parse_steer
from vectors.store import Library
from vectors.types import Phase

__all__ = ["STEER", "STEER_ID", "Injection", "Resolved", "parse_request", "resolve"]

STEER = "steer"
STEER_ID = "steer_id"


@dataclass(frozen=True, order=True)
class Injection:
    """One vector, by digest, added at one block at one dose in one phase."""

    vector: str
    block: int
    dose: float
    phase: Phase


@dataclass(frozen=True)
class Resolved:
    """What the workers apply, in a canonical order."""

    injections: tuple[Injection, ...]

    def to_json(self) -> str:
        """The canonical text, equal for equal steering."""
        rows = [[i.vector, i.block, i.dose, str(i.phase)] for i in self.injections]
        return json.dumps(rows, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Resolved:
        """The inverse of `to_json`."""
        rows = json.loads(text)
        return cls(tuple(Injection(v, int(b), float(d), Phase(p)) for v, b, d, p in rows))

    @property
    def digest(self) -> str:
        """sha256 of the canonical text: the salt that keeps steered prefixes apart."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def at(self, phase: Phase) -> tuple[Injection, ...]:
        """The injections that are active at positions of `phase`."""
        return tuple(i for i in self.injections if i.phase in (phase, Phase.ALL))


class _JsonTerm(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    dose: float
    revision: str | None = None
    blocks: list[int] = Field(default_factory=list, max_length=1000)
    phase: Phase = Phase.ALL


class _JsonRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    terms: list[_JsonTerm] = Field(min_length=1, max_length=64)


def parse_request(text: str) -> tuple[SteerTerm, ...]:
    """Parse what a client sent as `steer`: terms of the grammar, or the JSON form.

    Raises:
        GrammarError: neither.
        DoseError: a dose out of range.
    """
    if not isinstance(text, str):
        raise GrammarError(
            f"'{STEER}' must be text such as cheerful=0.2, not {type(text).__name__}."
        )
    if not text.lstrip().startswith("{"):
        return parse_steer(text)
    try:
        request = _JsonRequest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the object"
        raise GrammarError(
            f"The JSON form of '{STEER}' is wrong at {where}: {first['msg']}."
        ) from error
    return tuple(_expand(request.terms))


def _expand(terms: Iterable[_JsonTerm]) -> Iterable[SteerTerm]:
    for term in terms:
        check_dose(term.dose)
        for block in term.blocks or [None]:
            yield SteerTerm(term.name, term.dose, term.revision, block, None, term.phase)


def resolve(terms: Iterable[SteerTerm], library: Library, base: str) -> Resolved:
    """Turn names into digests and default blocks into blocks.

    Raises:
        NameNotFound: no such vector.
        ModelMismatch: a vector of another base.
        BlockNotFound: a block that the vector has no direction for.
    """
    found: list[Injection] = []
    for term in terms:
        ref = term.name if term.revision is None else f"{term.name}@{term.revision}"
        entry, vector = library.load_vector(ref)
        if vector.base != base:
            raise ModelMismatch(
                f"The vector '{ref}' belongs to base {vector.base[:12]}, and this engine serves "
                f"{base[:12]}; extract it again for this model."
            )
        for block in term.blocks(vector.best_block):
            if block not in vector.directions:
                raise BlockNotFound(
                    f"The vector '{ref}' has no direction at block {block}; "
                    f"it has {min(vector.directions)} to {max(vector.directions)}."
                )
            # A dose of 0 adds nothing; leaving it out keeps the reply bit for bit the base's.
            if term.dose != 0:
                found.append(Injection(entry.digest, block, term.dose, term.phase))
    return Resolved(tuple(sorted(found)))


def receipt_id(extra_args: dict[str, Any]) -> str:
    """The client's receipt id, or "" where it gave none.

    Raises:
        GrammarError: an id that is not short plain text.
    """
    given = extra_args.get(STEER_ID, "")
    if not isinstance(given, str) or len(given) > 64 or not (given == "" or given.isalnum()):
        raise GrammarError(f"'{STEER_ID}' must be up to 64 letters and digits.")
    return given
