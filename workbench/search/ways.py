"""The ways to go through coefficients.

A coefficient multiplies the weight that an ingredient has in the recipe: 0 leaves it out, 1 is as
written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Literal, get_args

from vectors.errors import InputError

__all__ = ["COEFFICIENTS", "MOST_POINTS", "WAYS", "Way", "check_points", "walk"]

Way = Literal["together", "each", "grid"]
WAYS: tuple[str, ...] = get_args(Way)
COEFFICIENTS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
MOST_POINTS = 400

Rows = Sequence[Sequence[float]]
Ask = Callable[[tuple[float, ...]], float]
"""Measures a point, one coefficient an ingredient, and says how good it is; more is better."""


def walk(way: Way, rows: Rows, ask: Ask) -> None:
    """Ask for every point that the way has; `rows` are the coefficients of each ingredient.

    together    one coefficient for all ingredients, those of the first row: the curve
    each        one ingredient after the other, the others at the best that was found so far
    grid        every combination
    """
    if way == "together":
        for c in rows[0]:
            ask((c,) * len(rows))
    elif way == "grid":
        for point in product(*rows):
            ask(point)
    else:
        best = [1.0] * len(rows)
        for place, row in enumerate(rows):
            scores = {c: ask((*best[:place], c, *best[place + 1 :])) for c in row}
            best[place] = max(scores, key=lambda c: scores[c])


def check_points(way: Way, rows: Rows) -> int:
    """Return how many points are asked for at most, or raise InputError where they are too many."""
    points = {
        "together": len(rows[0]),
        "each": sum(len(row) for row in rows),
        "grid": math.prod(len(row) for row in rows),
    }[way]
    if points > MOST_POINTS:
        raise InputError(
            f"{' x '.join(str(len(row)) for row in rows)} coefficients are {points} points, and "
            f"{MOST_POINTS} are the most; give fewer, or search each or together."
        )
    return points
