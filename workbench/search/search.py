"""Which coefficients of a recipe's ingredients are best, by held-out margins and general loss.

Half of the held-out pairs choose and the other half confirm: the best of many points is lucky on
the pairs that chose it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, pstdev
from types import MappingProxyType
from typing import Any

from vectors.steering.statistics import bootstrap_mean
from vectors.tasks import Recipe
from workbench.search.marks import Marks
from workbench.search.ways import Way, check_points, walk

__all__ = ["Ingredient", "Search", "Searched"]

Measure = Callable[[Recipe], Marks]
Report = Callable[[float, str], None]
Note = Callable[..., None]
NO_RANGES: Mapping[str, Sequence[float]] = MappingProxyType({})


@dataclass(frozen=True)
class Ingredient:
    """A task vector of the recipe, under the name that a person knows it by."""

    name: str
    digest: str
    weight: float


@dataclass(frozen=True)
class Point:
    """One choice of coefficients, and what was measured of it.

    Args:
        coefficients: by ingredient.
        terms: the same as task terms.
        margins: mean held-out margin of each behaviour, in nats, over all held-out pairs.
        changes: how far it is from the base's.
        general: loss on general text, nats a token.
        forgetting: how far it is above the base's.
        score: mean over the behaviours, by their weights, of the margin's change on the pairs that
            choose, in deviations of the base's margins.
        within: whether forgetting is within the budget.
    """

    coefficients: dict[str, float]
    terms: str
    margins: dict[str, float]
    changes: dict[str, float]
    general: float
    forgetting: float
    score: float
    within: bool


@dataclass(frozen=True)
class Searched:
    """What a search found; `confirmed` has the best point's changes on the pairs that did not choose."""

    points: list[Point]
    base: Point
    best: Point
    confirmed: dict[str, dict[str, Any]]
    behaviours: list[dict[str, Any]]
    budget: float
    words: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As the run keeps it and the page's chart reads it."""
        return asdict(self)


@dataclass
class Search:
    """One search over the coefficients of `recipe`.

    Args:
        recipe: method and options; its terms' weights are multiplied by the coefficients.
        ingredients: its terms, in the order in which a person named them.
        behaviours: the sets that are measured, each with how much it counts.
        measure: gives the marks of a recipe.
        budget: nats a token by which general loss may rise.
    """

    recipe: Recipe
    ingredients: Sequence[Ingredient]
    behaviours: Mapping[str, float]
    measure: Measure
    budget: float
    report: Report = lambda share, words: None
    note: Note = lambda **values: None

    def recipe_at(self, point: Sequence[float]) -> Recipe:
        """The recipe with these coefficients."""
        rows = zip(self.ingredients, point, strict=True)
        terms = tuple((i.digest, i.weight * c) for i, c in rows)
        return Recipe(op=self.recipe.op, base=self.recipe.base, terms=terms)

    def run(
        self,
        way: Way,
        coefficients: Sequence[float],
        ranges: Mapping[str, Sequence[float]] = NO_RANGES,
    ) -> Searched:
        """Measure the base and every point of the way, and choose.

        `ranges` has the coefficients of ingredients, by name, that take others than `coefficients`.
        The best point has the highest score of those within the budget; the base is one of them.
        """
        started = time.monotonic()
        rows = [ranges.get(i.name, coefficients) for i in self.ingredients]
        total = check_points(way, rows) + 1
        marks: dict[tuple[float, ...], Marks] = {}
        points: dict[tuple[float, ...], Point] = {}

        def ask(at: tuple[float, ...]) -> float:
            if at not in points:
                words = self._terms(at) or "the base"
                self.report(len(points) / total, f"measuring {words}")
                marks[at] = self.measure(self.recipe_at(at))
                points[at] = self._point(at, marks[at], marks[nothing])
                self.note(kind="point", **asdict(points[at]))
            return _rank(points[at])

        nothing = (0.0,) * len(rows)
        ask(nothing)
        walk(way, rows, ask)
        best = max(points, key=lambda at: _rank(points[at]))
        confirmed = {
            name: _confirmed(marks[best].margins[name], marks[nothing].margins[name], weight)
            for name, weight in self.behaviours.items()
        }
        behaviours = [
            {
                "name": name,
                "weight": weight,
                "pairs": len(marks[nothing].margins[name]),
                "base_margin": points[nothing].margins[name],
            }
            for name, weight in self.behaviours.items()
        ]
        return Searched(
            list(points.values()),
            points[nothing],
            points[best],
            confirmed,
            behaviours,
            self.budget,
            self._words(points[best], confirmed, best == nothing),
            time.monotonic() - started,
        )

    def _point(self, at: Sequence[float], mine: Marks, base: Marks) -> Point:
        margins = {name: mine.margin(name) for name in self.behaviours}
        general, least = _number(mine.general), _number(base.general)
        effects = {
            name: _effect(mine.margins[name][::2], base.margins[name]) for name in self.behaviours
        }
        whole = sum(abs(weight) for weight in self.behaviours.values())
        return Point(
            {i.name: c for i, c in zip(self.ingredients, at, strict=True)},
            self._terms(at),
            margins,
            {name: margin - base.margin(name) for name, margin in margins.items()},
            general,
            general - least,
            sum(weight * effects[name] for name, weight in self.behaviours.items()) / whole,
            general - least <= self.budget,
        )

    def _terms(self, at: Sequence[float]) -> str:
        rows = zip(self.ingredients, at, strict=True)
        return ",".join(f"{i.name}={i.weight * c:g}" for i, c in rows if i.weight * c)

    def _words(self, best: Point, confirmed: Mapping[str, Mapping[str, Any]], is_base: bool) -> str:
        if is_base:
            return (
                "No coefficients that were measured are better than the base within the budget of "
                f"{self.budget:g} nats a token; try smaller ones, or other behaviours."
            )
        changes = "; ".join(
            f"'{name}' changes by {row['change']:+.2f} nats (95 % {row['low']:+.2f} to "
            f"{row['high']:+.2f})"
            for name, row in confirmed.items()
        )
        words = (
            f"{best.terms} is the best: on the held-out pairs that did not choose it, {changes}, "
            f"and the general loss rises by {best.forgetting:.3f} nats a token."
        )
        doubtful = " and ".join(f"'{name}'" for name, row in confirmed.items() if not row["holds"])
        return (
            f"{words} They do not confirm that {doubtful} moves as wanted." if doubtful else words
        )


def _rank(point: Point) -> float:
    """The score, or minus infinity for a point that may not be chosen."""
    return point.score if point.within and math.isfinite(point.score) else -math.inf


def _effect(choosing: Sequence[float], base: Sequence[float]) -> float:
    """Mean change on the pairs that choose, in deviations of the base's margins over pairs."""
    change = fmean(a - b for a, b in zip(choosing, base[::2], strict=True))
    return change / (pstdev(base) or 1.0)


def _confirmed(margins: Sequence[float], base: Sequence[float], weight: float) -> dict[str, Any]:
    """The change on the pairs that did not choose; `holds` if its interval is on the wanted side."""
    changes = [a - b for a, b in zip(margins[1::2], base[1::2], strict=True)]
    change, low, high = bootstrap_mean(changes)
    holds = low > 0 if weight > 0 else high < 0
    return {"change": change, "low": low, "high": high, "pairs": len(changes), "holds": holds}


def _number(value: float | None) -> float:
    return math.nan if value is None else value
