"""What a person calls the ingredients of a recipe."""

from __future__ import annotations

from collections.abc import Iterable

from vectors.errors import WorkbenchError
from vectors.grammar import parse_tasks
from vectors.store import Library
from vectors.tasks import Recipe
from workbench.search.search import Ingredient

__all__ = ["called", "ingredients_of", "name_of"]

Called = dict[str, str]


def called(library: Library, refs: Iterable[str]) -> Called:
    """The task vectors that `refs` name, and those that recipes among them were written with.

    Names that have come to mean something else are left out.
    """
    found: Called = {}
    for ref in refs:
        try:
            entry = library.get(ref)
            if entry.kind == "task-vector":
                found.setdefault(entry.digest, ref)
            elif written := entry.info.get("written"):
                terms = parse_tasks(str(written))
                parts = [t.name if t.revision is None else f"{t.name}@{t.revision}" for t in terms]
                # A recipe may be written with its own name, of an older revision.
                found = {**called(library, [part for part in parts if part != ref]), **found}
        except (WorkbenchError, RecursionError):
            continue
    return found


def ingredients_of(library: Library, recipe: Recipe, known: Called) -> list[Ingredient]:
    """The terms of a recipe under their names, by name."""
    found = [Ingredient(name_of(library, d, known), d, weight) for d, weight in recipe.terms]
    return sorted(found, key=lambda ingredient: ingredient.name)


def name_of(library: Library, digest: str, known: Called) -> str:
    """The known name, or `name@revision` of the library's index, or 12 digits where there is none."""
    if digest in known:
        return known[digest]
    entry = library.get(digest)
    return f"{entry.name}@{entry.revision}" if entry.revision else entry.name
