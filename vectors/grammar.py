"""The one grammar of steering and task terms, and its one parser.

    steering terms   cheerful=0.2:15/decode,formal=-0.1
                     name[@revision]=dose[:block|:first-last][/phase][!operator]
    task terms       cheerful-baked=1,formal-baked=-0.5
                     name[@revision]=weight
    names            [a-z0-9][a-z0-9._-]*

`format_*` is the inverse of `parse_*`: parsing what was formatted gives the same terms.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from vectors.errors import DoseError, GrammarError
from vectors.types import Phase

__all__ = [
    "DOSE_LIMIT",
    "NAME",
    "OPERATORS",
    "SteerTerm",
    "TaskTerm",
    "check_name",
    "check_once",
    "format_steer",
    "format_tasks",
    "parse_steer",
    "parse_tasks",
]

NAME = r"[a-z0-9][a-z0-9._-]*"
NAME_LENGTH = 100
# Ten times the norm of the residual stream: text broke long before, in every model looked at.
DOSE_LIMIT = 10.0
OPERATORS = ("add", "ablate", "clamp", "turn")
"""What `vectors.steering.operators` can do."""

_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_REVISION = r"[A-Za-z0-9][A-Za-z0-9:-]*"
_STEER = re.compile(
    rf"(?P<name>{NAME})(?:@(?P<revision>{_REVISION}))?=(?P<dose>[^:/!,\s]+)"
    r"(?::(?P<first>[0-9]{1,5})(?:-(?P<last>[0-9]{1,5}))?)?(?:/(?P<phase>[A-Za-z]+))?(?:!(?P<op>[A-Za-z-]+))?"
)
_TASK = re.compile(rf"(?P<name>{NAME})(?:@(?P<revision>{_REVISION}))?=(?P<weight>[^,\s]+)")


@dataclass(frozen=True)
class SteerTerm:
    """One vector at one dose; no block means the vector's best block."""

    name: str
    dose: float
    revision: str | None = None
    first: int | None = None
    last: int | None = None
    phase: Phase = Phase.ALL
    operator: str = "add"

    def __post_init__(self) -> None:
        check_dose(self.dose)
        if self.operator not in OPERATORS:
            raise GrammarError(
                f"The operator '{self.operator}' is unknown; use {', '.join(OPERATORS)}."
            )
        if self.first is None and self.last is not None:
            raise GrammarError(f"The term for '{self.name}' has a last block and no first one.")
        if self.first is not None and self.last is not None and self.last < self.first:
            raise GrammarError(
                f"In the term for '{self.name}' the last block {self.last} comes before "
                f"the first block {self.first}."
            )

    @property
    def acts(self) -> bool:
        """Whether the term does anything; a clamp to 0 does."""
        return self.dose != 0 or self.operator == "clamp"

    def blocks(self, best: int) -> range:
        """The blocks that the term steers, given the vector's best block."""
        if self.first is None:
            return range(best, best + 1)
        return range(self.first, (self.first if self.last is None else self.last) + 1)


@dataclass(frozen=True)
class TaskTerm:
    """One task vector at one weight."""

    name: str
    weight: float
    revision: str | None = None


def check_name(name: str, what: str = "name") -> str:
    """Return `name`, or raise GrammarError where it does not match the names of the grammar."""
    if len(name) > NAME_LENGTH or not re.fullmatch(NAME, name):
        raise GrammarError(
            f"The {what} {name[:60]!r} is not valid; use up to {NAME_LENGTH} lower-case letters, "
            "digits, '.', '_' and '-', starting with a letter or digit."
        )
    return name


def check_dose(dose: float) -> float:
    """Return `dose`, or raise DoseError where it is not a number that could steer."""
    if not math.isfinite(dose):
        raise DoseError(f"A dose must be a finite number, not {dose}; try 0.2.")
    if abs(dose) > DOSE_LIMIT:
        raise DoseError(
            f"The dose {dose:g} is {abs(dose):g} times the residual stream's own norm; "
            f"stay within {DOSE_LIMIT:g}, and try 0.2 first."
        )
    return dose


def parse_steer(text: str) -> tuple[SteerTerm, ...]:
    """Parse comma-joined steering terms.

    Raises:
        GrammarError: a term that does not parse, or one that differs from another by its dose only.
        DoseError: a dose that is not a finite number in range.
    """
    return check_once(tuple(_steer_term(part) for part in _parts(text, "steering")))


def check_once(terms: tuple[SteerTerm, ...]) -> tuple[SteerTerm, ...]:
    """Return `terms`, or raise GrammarError where one differs from another by its dose only."""
    named = {(t.name, t.revision, t.first, t.last, t.phase, t.operator) for t in terms}
    if len(named) != len(terms):
        raise GrammarError(
            "A vector is named twice at the same blocks and phase; give it once, "
            "with its total dose."
        )
    return terms


def _steer_term(part: str) -> SteerTerm:
    match = _STEER.fullmatch(part)
    if match is None:
        raise GrammarError(
            f"{part[:80]!r} is not a steering term; write name=dose, for example cheerful=0.2 "
            "or cheerful@3=0.2:15/decode."
        )
    phase = match["phase"] or "all"
    if phase not in tuple(Phase):
        raise GrammarError(f"The phase '{phase}' is unknown; use prompt, decode or all.")
    return SteerTerm(
        name=check_name(match["name"]),
        dose=_number(match["dose"], f"dose of '{match['name']}'", DoseError),
        revision=match["revision"],
        first=None if match["first"] is None else int(match["first"]),
        last=None if match["last"] is None else int(match["last"]),
        phase=Phase(phase),
        operator=match["op"] or "add",
    )


def parse_tasks(text: str) -> tuple[TaskTerm, ...]:
    """Parse comma-joined task terms; a name alone has weight 1.

    Raises:
        GrammarError: a term that does not parse, or a name given twice.
    """
    terms = []
    for part in _parts(text, "task"):
        match = _TASK.fullmatch(part if "=" in part else part + "=1")
        if match is None:
            raise GrammarError(
                f"{part[:80]!r} is not a task term; write name=weight, "
                "for example cheerful-baked=0.5."
            )
        weight = _number(match["weight"], f"weight of '{match['name']}'", GrammarError)
        if not math.isfinite(weight) or abs(weight) > 100:
            raise GrammarError(f"The weight of '{match['name']}' must be within 100, not {weight}.")
        terms.append(TaskTerm(check_name(match["name"]), weight, match["revision"]))
    names = [(t.name, t.revision) for t in terms]
    if len(set(names)) != len(names):
        raise GrammarError(
            "A task vector is named twice; give each one once, with its total weight."
        )
    return tuple(terms)


def format_steer(terms: Sequence[SteerTerm]) -> str:
    """The text that `parse_steer` reads back as `terms`."""
    return ",".join(
        f"{_ref(t.name, t.revision)}={t.dose!r}"
        + ("" if t.first is None else f":{t.first}" + ("" if t.last is None else f"-{t.last}"))
        + ("" if t.phase is Phase.ALL else f"/{t.phase}")
        + ("" if t.operator == "add" else f"!{t.operator}")
        for t in terms
    )


def format_tasks(terms: Sequence[TaskTerm]) -> str:
    """The text that `parse_tasks` reads back as `terms`."""
    return ",".join(f"{_ref(t.name, t.revision)}={t.weight!r}" for t in terms)


def _ref(name: str, revision: str | None) -> str:
    return name if revision is None else f"{name}@{revision}"


def _parts(text: str, what: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not text.strip() or not all(parts):
        raise GrammarError(
            f"An empty {what} term in {text[:80]!r}; join terms by single commas, "
            "as in a=0.2,b=-0.1."
        )
    return parts


def _number(text: str, what: str, error: type[GrammarError] | type[DoseError]) -> float:
    if not re.fullmatch(_NUMBER, text):
        raise error(f"The {what} must be a finite number, not {text[:40]!r}; try 0.2.")
    return float(text)
