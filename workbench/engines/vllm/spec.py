"""A steering request on its way into vLLM: parsed by the front end, read by the workers.

A client sends, in `vllm_xargs`, `steer` (terms of the grammar, or the JSON form) and `steer_id` (an
id of its own, under which the receipt is kept). The front end resolves names to digests and replaces
`steer` by the canonical JSON of a `Resolved`, which is all that the workers ever see.

    {"terms": [{"name": "cheerful", "dose": 0.2, "blocks": [15], "phase": "decode"}], "start": 4}

is the JSON form; a term may also have `revision` and `operator`, and positions before `start` stay as
they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vectors.errors import BlockNotFound, GrammarError, ModelMismatch
from vectors.grammar import SteerTerm, parse_steer
from vectors.steering.operators import check_together
from vectors.store import Library
from vectors.types import Phase

__all__ = [
    "STEER",
    "STEER_ID",
    "Injection",
    "Resolved",
    "parse_request",
    "resolve",
    "resolve_request",
]

STEER = "steer"
STEER_ID = "steer_id"


@dataclass(frozen=True, order=True)
class Injection:
    """One vector, by digest, applied at one block at one dose in one phase."""

    vector: str
    block: int
    dose: float
    phase: Phase
    operator: str = "add"


@dataclass(frozen=True)
class Resolved:
    """What the workers apply, in a canonical order; positions before `start` stay as they are."""

    injections: tuple[Injection, ...]
    start: int = 0

    def to_json(self) -> str:
        """The canonical text, equal for equal steering."""
        terms = [[i.vector, i.block, i.dose, str(i.phase), i.operator] for i in self.injections]
        return json.dumps({"terms": terms, "start": self.start}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Resolved:
        """The inverse of `to_json`.

        Raises:
            GrammarError: a text that our front end has not made.
        """
        try:
            read = json.loads(text)
            terms = [Injection(v, int(b), float(d), Phase(p), o) for v, b, d, p, o in read["terms"]]
            return cls(tuple(terms), int(read["start"]))
        except (ValueError, TypeError, KeyError) as error:
            raise GrammarError(
                f"The engine got steering that its front end has not resolved ({text[:60]!r}); send "
                "requests through vLLM's own server or LLM class."
            ) from error

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
    operator: str = "add"


class _JsonRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    terms: list[_JsonTerm] = Field(min_length=1, max_length=64)
    start: int = Field(default=0, ge=0, le=100_000_000)


def parse_request(text: str) -> tuple[SteerTerm, ...]:
    """Return the terms of what a client sent as `steer`: the grammar's, or the JSON form's.

    Raises:
        GrammarError: neither.
        DoseError: a dose out of range.
    """
    return _parse(text)[0]


def resolve_request(text: str, library: Library, base: str) -> Resolved:
    """Parse what a client sent as `steer`, and resolve it.

    Raises:
        InputError: see `parse_request` and `resolve`.
    """
    terms, start = _parse(text)
    return resolve(terms, library, base, start)


def _parse(text: str) -> tuple[tuple[SteerTerm, ...], int]:
    if not isinstance(text, str):
        raise GrammarError(
            f"'{STEER}' must be text such as cheerful=0.2, not {type(text).__name__}."
        )
    if not text.lstrip().startswith("{"):
        return parse_steer(text), 0
    try:
        request = _JsonRequest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the object"
        raise GrammarError(
            f"The JSON form of '{STEER}' is wrong at {where}: {first['msg']}."
        ) from error
    return tuple(_expand(request.terms)), request.start


def _expand(terms: Iterable[_JsonTerm]) -> Iterable[SteerTerm]:
    for t in terms:
        for block in t.blocks or [None]:
            yield SteerTerm(t.name, t.dose, t.revision, block, None, t.phase, t.operator)


def resolve(terms: Iterable[SteerTerm], library: Library, base: str, start: int = 0) -> Resolved:
    """Turn names into digests and default blocks into blocks.

    Raises:
        NameNotFound: no such vector.
        ModelMismatch: a vector of another base.
        BlockNotFound: a block that the vector has no direction for.
        GrammarError: operators that cannot act together.
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
            if term.acts:
                found.append(Injection(entry.digest, block, term.dose, term.phase, term.operator))
    resolved = Resolved(tuple(sorted(found)), start)
    for phase in (Phase.PROMPT, Phase.DECODE):
        by_block: dict[int, list[str]] = {}
        for injection in resolved.at(phase):
            by_block.setdefault(injection.block, []).append(injection.operator)
        for operators in by_block.values():
            check_together(operators)
    return resolved


def receipt_id(extra_args: dict[str, Any]) -> str:
    """The client's receipt id, or "" where it gave none.

    Raises:
        GrammarError: an id that is not short plain text.
    """
    given = extra_args.get(STEER_ID, "")
    if not isinstance(given, str) or len(given) > 64 or not (given == "" or given.isalnum()):
        raise GrammarError(f"'{STEER_ID}' must be up to 64 letters and digits.")
    return given
