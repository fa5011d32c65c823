"""A steering request on its way into vLLM: parsed by the front end, read by the workers.

A client sends, in `vllm_xargs`, `steer` (terms of the grammar, or the JSON form) and `steer_id` (an
id of its own, under which the receipt is kept). The front end resolves names to digests and replaces
`steer` by the canonical JSON of a `Resolved`, which is all that the workers ever see.

    {"terms": [{"name": "cheerful", "dose": 0.2, "blocks": [15], "phase": "decode"}], "start": 4}

is the JSON form; a term may also have `revision` and `operator`, and positions before `start` stay as
they are. With a condition, such as

    "condition": {"name": "question", "block": 12, "above": 0.05}

(or `below`; `block` is the vector's best where it is left out) the prompt decides whether what follows is
steered: by the mean of its projections on that direction, as a share of its mean norm.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vectors.errors import BlockNotFound, GrammarError, ModelMismatch
from vectors.grammar import SteerTerm, check_once, parse_steer
from vectors.steering.operators import check_together
from vectors.store import Library
from vectors.types import Phase

__all__ = [
    "STEER",
    "STEER_ID",
    "Condition",
    "Injection",
    "Known",
    "Parsed",
    "Resolved",
    "Row",
    "as_text",
    "check_vector",
    "known",
    "parse_request",
    "parse_steering",
    "resolve",
    "resolve_request",
]

STEER = "steer"
STEER_ID = "steer_id"
PARSED_KEPT = 512


@dataclass(frozen=True, order=True)
class Injection:
    """One vector, by digest, applied at one block at one dose in one phase."""

    vector: str
    block: int
    dose: float
    phase: Phase
    operator: str = "add"


class Row(tuple[Injection, ...]):
    """The injections of one phase, which name a row of the table; hashed once, for it is asked often."""

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return super().__hash__()

    @cached_property
    def adds_only(self) -> bool:
        """Whether one addition at each block says it all."""
        return all(injection.operator == "add" for injection in self)

    @cached_property
    def blocks(self) -> int:
        """How many blocks it steers."""
        return len({injection.block for injection in self})


@dataclass(frozen=True)
class Condition:
    """Steer only where the prompt lies on one side of a threshold.

    With unit direction `v` and the residual stream `h` behind `block`, over the prompt's positions,
    `c = sum(h . v) / sum(|h|)`, between -1 and 1. After conditional activation steering (Lee et al. 2024,
    arXiv 2409.05907), which compares the cosine of one mean.

    Args:
        vector: digest of the vector whose direction is read.
        block: at whose output.
        threshold: for `c`.
        above: whether a `c` above it steers, or one below.
    """

    vector: str
    block: int
    threshold: float
    above: bool = True

    def holds(self, projection: float) -> bool:
        """Whether a prompt with this `c` is steered."""
        return projection > self.threshold if self.above else projection < self.threshold


@dataclass(frozen=True)
class Resolved:
    """What the workers apply, in a canonical order; positions before `start` stay as they are."""

    injections: tuple[Injection, ...]
    start: int = 0
    condition: Condition | None = None

    def to_json(self) -> str:
        """The canonical text, equal for equal steering."""
        return self._text

    @cached_property
    def _text(self) -> str:
        terms = [[i.vector, i.block, i.dose, str(i.phase), i.operator] for i in self.injections]
        said: dict[str, Any] = {"terms": terms, "start": self.start}
        if (c := self.condition) is not None:
            said["condition"] = [c.vector, c.block, c.threshold, c.above]
        return json.dumps(said, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Resolved:
        """The inverse of `to_json`; equal texts are read once.

        Raises:
            GrammarError: a text that our front end has not made.
        """
        try:
            return _read(text)
        except (ValueError, TypeError, KeyError) as error:
            raise GrammarError(
                f"The engine got steering that its front end has not resolved ({str(text)[:60]!r}); "
                "send requests through vLLM's own server or LLM class."
            ) from error

    @cached_property
    def digest(self) -> str:
        """sha256 of the canonical text: the salt that keeps steered prefixes apart."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def at(self, phase: Phase) -> Row:
        """The injections that are active at positions of `phase`, prompt or decode."""
        return self._prompt if phase is Phase.PROMPT else self._decode

    @cached_property
    def rows(self) -> frozenset[Row]:
        """The rows of the table that it needs."""
        return frozenset(row for row in (self._prompt, self._decode) if row)

    @cached_property
    def operators(self) -> frozenset[str]:
        """Those of its injections."""
        return frozenset(i.operator for i in self.injections)

    @cached_property
    def _prompt(self) -> Row:
        return Row(i for i in self.injections if i.phase is not Phase.DECODE)

    @cached_property
    def _decode(self) -> Row:
        row = Row(i for i in self.injections if i.phase is not Phase.PROMPT)
        return self._prompt if row == self._prompt else row


@lru_cache(PARSED_KEPT)
def _read(text: str) -> Resolved:
    read = json.loads(text)
    terms = [Injection(v, int(b), float(d), Phase(p), o) for v, b, d, p, o in read["terms"]]
    condition = None
    if "condition" in read:
        vector, block, threshold, above = read["condition"]
        condition = Condition(vector, int(block), float(threshold), bool(above))
    return Resolved(tuple(terms), int(read["start"]), condition)


@dataclass(frozen=True)
class Known:
    """What a request needs to know of a vector."""

    digest: str
    base: str
    best_block: int
    blocks: frozenset[int]
    width: int
    files: tuple[tuple[str, int, int], ...] = ()

    def untouched(self) -> bool:
        """Whether its files are still there, of the size and the time that they had when it was read."""
        return all(_stamp(path) == (path, time, size) for path, time, size in self.files)


def _stamp(path: str) -> tuple[str, int, int]:
    try:
        state = os.stat(path)
    except OSError:
        return path, 0, -1
    return path, state.st_mtime_ns, state.st_size


def known(library: Library, ref: str) -> Known:
    """Look a vector up.

    Raises:
        NameNotFound, StoreCorrupt: no such vector, or a damaged one.
    """
    entry, vector = library.load_vector(ref)
    paths = (
        library.manifests.path(entry.digest),
        *map(library.objects.path, entry.manifest.objects()),
    )
    files = tuple(_stamp(str(path)) for path in paths)
    blocks = frozenset(vector.directions)
    return Known(entry.digest, vector.base, vector.best_block, blocks, vector.width, files)


# A dose of "1" or true is a mistake of who sent it, and not 1.
_STRICT = ConfigDict(extra="forbid", strict=True)


class _JsonTerm(BaseModel):
    model_config = _STRICT
    name: str
    dose: float
    revision: str | None = None
    blocks: list[int] = Field(default_factory=list, max_length=1000)
    phase: Phase = Phase.ALL
    operator: str = "add"


class _JsonCondition(BaseModel):
    model_config = _STRICT
    name: str
    revision: str | None = None
    block: int | None = None
    above: float | None = Field(default=None, ge=-1, le=1)
    below: float | None = Field(default=None, ge=-1, le=1)


class _JsonRequest(BaseModel):
    model_config = _STRICT
    terms: list[_JsonTerm] = Field(min_length=1, max_length=64)
    start: int = Field(default=0, ge=0, le=100_000_000)
    condition: _JsonCondition | None = None


class Parsed(NamedTuple):
    """What a client sent as `steer`; the condition still names its vector."""

    terms: tuple[SteerTerm, ...]
    start: int = 0
    condition: _JsonCondition | None = None


def parse_request(text: str) -> tuple[SteerTerm, ...]:
    """Return the terms of what a client sent as `steer`: the grammar's, or the JSON form's.

    Raises:
        GrammarError: neither, or a term that differs from another by its dose only.
        DoseError: a dose out of range.
    """
    return parse_steering(text).terms


def resolve_request(text: str, library: Library, base: str) -> Resolved:
    """Parse what a client sent as `steer`, and resolve it.

    Raises:
        InputError: see `parse_request` and `resolve`.
    """
    return resolve(parse_steering(text), partial(known, library), base)


def as_text(steer: Any) -> Any:
    """What a client sent as `steer`, its JSON form as text where it sent the object itself.

    Raises:
        GrammarError: an object that JSON cannot hold.
    """
    if not isinstance(steer, dict):
        return steer
    try:
        return json.dumps(steer)
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"'{STEER}' has something that is no JSON: {error}.") from error


def parse_steering(text: str) -> Parsed:
    """Read what a client sent as `steer`.

    Raises:
        GrammarError, DoseError: see `parse_request`.
    """
    if not isinstance(text, str):
        raise GrammarError(
            f"'{STEER}' must be text such as cheerful=0.2, not {type(text).__name__}."
        )
    if not text.lstrip().startswith("{"):
        return Parsed(parse_steer(text))
    try:
        request = _JsonRequest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the object"
        raise GrammarError(
            f"The JSON form of '{STEER}' is wrong at {where}: {first['msg']}."
        ) from error
    return Parsed(
        check_once(tuple(_expand(request.terms))), request.start, _checked(request.condition)
    )


def _checked(condition: _JsonCondition | None) -> _JsonCondition | None:
    if condition is not None and (condition.above is None) == (condition.below is None):
        raise GrammarError(
            f"The condition of '{STEER}' needs one of 'above' and 'below', a number from -1 to 1."
        )
    return condition


def _expand(terms: Iterable[_JsonTerm]) -> Iterable[SteerTerm]:
    for t in terms:
        for block in t.blocks or [None]:
            yield SteerTerm(t.name, t.dose, t.revision, block, None, t.phase, t.operator)


def resolve(asked: Parsed, find: Callable[[str], Known], base: str) -> Resolved:
    """Turn names into digests and default blocks into blocks; `find` looks a vector up.

    Raises:
        NameNotFound: no such vector.
        ModelMismatch: a vector of another base.
        BlockNotFound: a block that the vector has no direction for.
        GrammarError: operators that cannot act together, or a condition on the prompt's own steering.
    """
    found: list[Injection] = []
    for term in asked.terms:
        ref, vector = _find(term, find, base)
        for block in term.blocks(vector.best_block):
            check_vector(ref, vector, base, block)
            # A dose of 0 adds nothing; leaving it out keeps the reply bit for bit the base's.
            if term.acts:
                found.append(Injection(vector.digest, block, term.dose, term.phase, term.operator))
    resolved = Resolved(tuple(sorted(found)), asked.start, _condition(asked, find, base))
    if resolved.condition is not None and resolved.at(Phase.PROMPT):
        raise GrammarError(
            "A condition is decided by the prompt, so that only what follows can be steered; give each "
            "term the phase decode."
        )
    for phase in (Phase.PROMPT, Phase.DECODE):
        by_block: dict[int, list[str]] = {}
        for injection in resolved.at(phase):
            by_block.setdefault(injection.block, []).append(injection.operator)
        for operators in by_block.values():
            check_together(operators)
    return resolved


def _find(
    named: SteerTerm | _JsonCondition, find: Callable[[str], Known], base: str
) -> tuple[str, Known]:
    ref = named.name if named.revision is None else f"{named.name}@{named.revision}"
    vector = find(ref)
    check_vector(ref, vector, base)
    return ref, vector


def check_vector(ref: str, vector: Known, base: str, block: int | None = None) -> None:
    """Refuse a vector of another base, or a block that it has no direction for.

    Raises:
        ModelMismatch, BlockNotFound: see there.
    """
    if vector.base != base:
        raise ModelMismatch(
            f"The vector '{ref}' belongs to base {vector.base[:12]}, and this engine serves "
            f"{base[:12]}; extract it again for this model."
        )
    if block is not None and block not in vector.blocks:
        raise BlockNotFound(
            f"The vector '{ref}' has no direction at block {block}; "
            f"it has {min(vector.blocks)} to {max(vector.blocks)}."
        )


def _condition(asked: Parsed, find: Callable[[str], Known], base: str) -> Condition | None:
    c = asked.condition
    if c is None:
        return None
    ref, vector = _find(c, find, base)
    block = vector.best_block if c.block is None else c.block
    check_vector(ref, vector, base, block)
    threshold = c.above if c.above is not None else c.below
    assert threshold is not None
    return Condition(vector.digest, block, threshold, c.above is not None)


def receipt_id(extra_args: dict[str, Any]) -> str:
    """The client's receipt id, or "" where it gave none.

    Raises:
        GrammarError: an id that is not short plain text.
    """
    given = extra_args.get(STEER_ID, "")
    if not isinstance(given, str) or len(given) > 64 or not (given == "" or given.isalnum()):
        raise GrammarError(f"'{STEER_ID}' must be up to 64 letters and digits.")
    return given
