"""Which version, or which ingredient, changed a behaviour: binary search between good and bad.

The states between good and bad lie in a row: the revisions of a name, or the good recipe with ever
more of the bad one's ingredients. Halving the row ends at two neighbours, one good and one bad, both
of them measured, however the states between them behave.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from vectors.errors import InputError
from vectors.steering.statistics import bootstrap_mean
from vectors.tasks import Recipe
from workbench.search.marks import Marks

__all__ = ["Bisection", "State", "Test", "first_changed"]

SMALLEST = 1e-3
"""Nats a token by which the general loss must differ to be told apart."""

Report = Callable[[float, str], None]
Note = Callable[..., None]


def first_changed(last: int, changed: Callable[[int], bool]) -> int:
    """Return `i` such that state `i` has changed and state `i - 1` has not.

    State 0 has not and state `last` has; at most `ceil(log2(last))` others are asked for.
    """
    good, bad = 0, last
    while bad - good > 1:
        middle = (good + bad) // 2
        if changed(middle):
            bad = middle
        else:
            good = middle
    return bad


@dataclass(frozen=True)
class State:
    """One of the row: how a person calls it, and the recipe of its weights."""

    name: str
    recipe: Recipe


@dataclass(frozen=True)
class Test:
    """What tells good from bad: the margin of a behaviour, or the general loss where it has no name."""

    __test__ = False  # pytest collects classes of this name

    behaviour: str
    threshold: float | None = None

    @property
    def words(self) -> str:
        """What is measured."""
        return f"the margin of '{self.behaviour}'" if self.behaviour else "the general loss"

    def value(self, marks: Marks) -> float:
        """The number that is held against the threshold, in nats."""
        if self.behaviour:
            return marks.margin(self.behaviour)
        return math.nan if marks.general is None else marks.general

    def told_apart(self, good: Marks, bad: Marks) -> bool:
        """Whether the two differ by more than the pairs' chance would give."""
        if not self.behaviour:
            return abs(self.value(good) - self.value(bad)) > SMALLEST
        pairs = zip(good.margins[self.behaviour], bad.margins[self.behaviour], strict=True)
        _, low, high = bootstrap_mean([b - a for a, b in pairs])
        return low > 0 or high < 0


@dataclass
class Bisection:
    """A search between two states.

    Args:
        test: what is measured.
        measure: gives the marks of a recipe.
    """

    test: Test
    measure: Callable[[Recipe], Marks]
    report: Report = lambda share, words: None
    note: Note = lambda **values: None
    measured: list[dict[str, Any]] = field(default_factory=list)
    _marks: dict[str, Marks] = field(default_factory=dict)
    _threshold: float = math.nan
    _bad_is_above: bool = False
    _steps: int = 1

    def between(self, good: State, bad: State, expected: int) -> None:
        """Measure both ends and set the threshold, half way between them where none is given.

        Args:
            expected: states between them, from which the time that is left is told.

        Raises:
            InputError: the two do not differ in the test.
        """
        self._steps = 4 + max(1, expected).bit_length()
        first, last = self._ask(good), self._ask(bad)
        a, b = self.test.value(first), self.test.value(last)
        given = self.test.threshold
        words = f"'{good.name}' has {a:.3f} and '{bad.name}' {b:.3f} in {self.test.words}"
        if given is None and not self.test.told_apart(first, last):
            raise InputError(
                f"{words}, no more apart than chance allows; name another behaviour, or entries "
                "that differ."
            )
        self._threshold = (a + b) / 2 if given is None else given
        self._bad_is_above = b > self._threshold
        if not math.isfinite(a + b) or (a > self._threshold) == self._bad_is_above:
            raise InputError(
                f"{words}, both on one side of the threshold {self._threshold:g}; choose one "
                "between them, or another behaviour."
            )

    def changed(self, state: State) -> bool:
        """Whether the state is on the bad side of the threshold."""
        return (self.value(state) > self._threshold) == self._bad_is_above

    def value(self, state: State) -> float:
        """What the test measures of the state; each recipe is measured once."""
        return self.test.value(self._ask(state))

    def along(self, states: Sequence[State]) -> int:
        """The place of the first changed state of a row that starts good and ends bad."""
        return first_changed(len(states) - 1, lambda place: self.changed(states[place]))

    def to_json(self) -> dict[str, Any]:
        """What was measured and by which test."""
        return {
            "test": {**asdict(self.test), "threshold": self._threshold, "words": self.test.words},
            "bad_is": "above" if self._bad_is_above else "below",
            "measured": self.measured,
        }

    def _ask(self, state: State) -> Marks:
        key = state.recipe.digest
        if key not in self._marks:
            share = min(len(self._marks) / self._steps, 0.95)
            self.report(share, f"measuring {state.name}")
            started = time.monotonic()
            marks = self._marks[key] = self.measure(state.recipe)
            row = {"state": state.name, "value": self.test.value(marks)}
            if self.test.behaviour:
                row["pairs"] = len(marks.margins[self.test.behaviour])
                row["in_order"] = fmean(m > 0 for m in marks.margins[self.test.behaviour])
            row["seconds"] = time.monotonic() - started
            self.measured.append(row)
            self.note(kind="measured", **row)
        return self._marks[key]
