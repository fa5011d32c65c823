"""Keep the best coefficients of a search as a recipe, with what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from vectors.errors import InputError, NameNotFound
from vectors.store import Library
from vectors.tasks import Operation, Recipe

__all__ = ["best_recipe", "keep_best"]

Result = Mapping[str, Any]


def best_recipe(found: Result) -> Recipe:
    """The recipe of a search's best point; its task vectors go by their digests, as were measured.

    Raises:
        InputError: nothing is better than the base, or a result of another version.
    """
    try:
        best, rows = found["best"], found["ingredients"]
        terms = tuple(
            (row["digest"], row["weight"] * best["coefficients"][row["name"]]) for row in rows
        )
        if best["terms"]:
            op = Operation.of(found["method"], found["options"])
            return Recipe(op=op, base=found["base_digest"], terms=terms)
    except (KeyError, TypeError, ValidationError) as error:
        raise InputError(
            "The search's result is of another version, and its recipe cannot be read; search again."
        ) from error
    raise InputError(
        "The base is the best that was measured, and there is no recipe to keep; try other "
        "coefficients, or a larger budget."
    )


def keep_best(library: Library, found: Result, name: str) -> dict[str, Any]:
    """Keep the best point of a search as the recipe `name`, and attest its measurements to it.

    Keeping the same recipe under the same name again changes nothing.

    Raises:
        InputError: see `best_recipe`.
        NameTaken: the name belongs to something else.
        NameNotFound: a task vector that is no longer in the library.
    """
    recipe = best_recipe(found)
    if (entry := _newest(library, name, recipe)) is None:
        searched = [row["name"] for row in found["behaviours"]]
        info = {"written": found["best"]["terms"], "searched": searched}
        entry = library.save_recipe(name, recipe, info=info)
        evidence = {"best": found["best"], "confirmed": found["confirmed"]}
        library.attest(entry.digest, "evaluation", evidence)
    return {"name": entry.name, "revision": entry.revision, "digest": entry.digest}


def _newest(library: Library, name: str, recipe: Recipe) -> Any:
    """The newest revision of `name`, if it is this recipe already."""
    try:
        entry, there = library.load_recipe(name)
    except NameNotFound:
        return None
    return entry if there == recipe else None
