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

Ask = Callable[[tuple[float, ...]], float]
"""Measures a point, one coefficient an ingredient, and says how good it is; more is better."""


def walk(way: Way, count: int, coefficients: Sequence[float], ask: Ask) -> None:
    """Ask for every point that the way has for `count` ingredients.

    together    one coefficient for all ingredients: the curve
    each        one ingredient after the other, the others at the best that was found so far
    grid        every combination
    """
    if way == "together":
        for c in coefficients:
            ask((c,) * count)
    elif way == "grid":
        for point in product(coefficients, repeat=count):
            ask(point)
    else:
        best = [1.0] * count
        for place in range(count):
            scores = {c: ask((*best[:place], c, *best[place + 1 :])) for c in coefficients}
            best[place] = max(scores, key=lambda c: scores[c])


def check_points(way: Way, count: int, coefficients: Sequence[float]) -> int:
    """Return how many points are asked for at most, or raise InputError where they are too many."""
    points = {
        "together": len(coefficients),
        "each": count * len(coefficients),
        "grid": math.prod([len(coefficients)] * count),
    }[way]
    if points > MOST_POINTS:
        raise InputError(
            f"{len(coefficients)} coefficients for each of {count} ingredients are {points} "
            f"points, and {MOST_POINTS} are the most; give fewer, or search each or together."
        )
    return points
