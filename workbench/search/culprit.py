"""From the row of states to the one sentence: the version, or the ingredient, that changed it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vectors.errors import InputError
from vectors.tasks import Recipe
from workbench.search.bisect import Bisection, State
from workbench.search.search import Ingredient

__all__ = ["in_history", "in_ingredients"]


def in_history(search: Bisection, states: Sequence[State]) -> dict[str, Any]:
    """Find the version: `states` are the revisions from the good one to the bad one.

    Raises:
        InputError: the ends do not differ.
    """
    search.between(states[0], states[-1], len(states) - 2)
    place = search.along(states)
    before, found = states[place - 1], states[place]
    words = (
        f"'{found.name}' changed it: {search.test.words} is {search.value(before):.3f} at "
        f"'{before.name}' and {search.value(found):.3f} at '{found.name}'."
    )
    return {"over": "history", "found": found.name, "before": before.name, "words": words}


def in_ingredients(
    search: Bisection,
    good: State,
    bad: State,
    changes: Sequence[Ingredient],
) -> dict[str, Any]:
    """Find the ingredient that tips the good recipe over, and see what it does alone.

    Args:
        changes: task vectors whose weights differ, each with its weight in `bad`, 0 where it is
            not in it.

    Raises:
        InputError: the ends do not differ, or the recipe cannot be taken apart.
    """
    least = bad.recipe.op.row.least
    if least > 1:
        raise InputError(
            f"The method '{bad.recipe.op.method}' needs at least {least} ingredients, so its "
            "recipes cannot be taken apart one by one; bisect the history instead."
        )

    def state(some: Sequence[Ingredient]) -> State:
        if len(some) == len(changes):
            return bad
        names = " + ".join(i.name for i in some)
        return State(f"{good.name} with {names}", _with(good.recipe, bad.recipe, some))

    search.between(good, bad, len(changes) - 1)
    row = [good, *(state(changes[: n + 1]) for n in range(len(changes)))]
    place = search.along(row)
    found, earlier = changes[place - 1], changes[: place - 1]
    alone = state([found])
    others = state([i for i in changes if i != found]) if len(changes) > 1 else good
    by_itself, needed = search.changed(alone), not search.changed(others)
    value = search.value(alone)
    if by_itself:
        words = (
            f"'{found.name}' changed it: with it alone {search.test.words} is {value:.3f}, where "
            f"'{good.name}' has {search.value(good):.3f}"
        )
    else:
        names = ", ".join(f"'{i.name}'" for i in earlier)
        words = (
            f"'{found.name}' changed it together with {names}: alone it leaves "
            f"{search.test.words} at {value:.3f}, and on top of them it is "
            f"{search.value(row[place]):.3f}"
        )
    rest = f"'{bad.name}' without it has {search.value(others):.3f}"
    words += f"; {rest}, {'good' if needed else 'still bad, so that others do it too'}."
    return {
        "over": "ingredients",
        "found": found.name,
        "weight": found.weight,
        "with": [i.name for i in earlier] if not by_itself else [],
        "alone": value,
        "without": search.value(others),
        "needed": needed,
        "words": words,
    }


def _with(good: Recipe, bad: Recipe, some: Sequence[Ingredient]) -> Recipe:
    """The good recipe with the bad one's weights of some task vectors."""
    weights = {**dict(good.terms), **{i.digest: i.weight for i in some}}
    return Recipe(op=bad.op, base=bad.base, terms=tuple(weights.items()))
