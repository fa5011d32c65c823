"""`good..bad`: two entries of the library, and the states that lie between them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from vectors.errors import InputError
from vectors.store import Entry, Library
from vectors.store.reference import parse_reference
from vectors.tasks import Recipe
from workbench.search.bisect import State
from workbench.search.names import name_of
from workbench.search.search import Ingredient

__all__ = ["TASKS", "Over", "changes_between", "parse_between", "recipe_at", "revisions_between"]

Over = Literal["auto", "history", "ingredients"]
TASKS = ("task-vector", "recipe")


def parse_between(text: str, over: Over = "auto") -> tuple[str, str, Over]:
    """Parse `good..bad`, or `bad` alone, which is held against the base; also say what is searched.

    The good side is "" for the base. Two revisions of one name mean the history, everything else
    the ingredients, unless `over` says which.

    Raises:
        GrammarError: a side that is no reference.
        InputError: both sides the same, or a history between two names.
    """
    parts = re.split(r"\.\.(?!\.)", text.strip())
    if len(parts) > 2 or not all(parts):
        raise InputError(
            f"{text[:100]!r} is not two entries; write good..bad, as in cheerful@3..cheerful@9, or "
            "the name of a recipe, whose ingredients are then held against the base."
        )
    good, bad = parts if len(parts) == 2 else ("", parts[0])
    names = [parse_reference(side).name for side in (good, bad) if side]
    if good == bad:
        raise InputError(f"Good and bad are both '{bad}'; name two entries that differ.")
    same = len(names) == 2 and names[0] == names[1]
    if over == "history" and not same:
        raise InputError(
            f"A history lies between two revisions of one name, not in {text[:100]!r}; write "
            f"{names[-1]}@1..{names[-1]}, or search the ingredients."
        )
    return good, bad, ("history" if same else "ingredients") if over == "auto" else over


def revisions_between(library: Library, good: str, bad: str) -> list[Entry]:
    """The revisions of the name from the good one to the bad one, in that direction.

    Raises:
        NameNotFound: a revision that is not there.
    """
    first, last = library.get(good).revision, library.get(bad).revision
    low, high = sorted((first, last))
    found = [e for e in library.history(parse_reference(bad).name) if low <= e.revision <= high]
    return sorted(found, key=lambda entry: entry.revision, reverse=first > last)


def recipe_at(library: Library, entry: Entry) -> Recipe:
    """The recipe of an entry, be it a recipe or a task vector."""
    if entry.kind == "recipe":
        return library.load_recipe(entry.digest)[1]
    return Recipe(base=str(entry.base), terms=((entry.digest, 1.0),))


def changes_between(
    library: Library, good: State, bad: State, known: Mapping[str, str]
) -> list[Ingredient]:
    """The task vectors whose weights differ, each with its weight in `bad`, by name.

    Args:
        known: what task vectors are called, by digest.

    Raises:
        InputError: recipes of two methods.
    """
    if good.recipe.terms and good.recipe.op != bad.recipe.op:
        raise InputError(
            f"'{good.name}' and '{bad.name}' are merged by different methods or options, which no "
            "ingredient can be blamed for; hold one of them against the base."
        )
    before, after = dict(good.recipe.terms), dict(bad.recipe.terms)
    differing = [d for d in {**before, **after} if before.get(d, 0.0) != after.get(d, 0.0)]
    found = [Ingredient(name_of(library, d, dict(known)), d, after.get(d, 0.0)) for d in differing]
    return sorted(found, key=lambda ingredient: ingredient.name)
