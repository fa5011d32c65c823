"""From task terms to weights on the disk that an engine can load."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vectors.errors import ModelMismatch, OutOfSpace
from vectors.grammar import TaskTerm, format_tasks
from vectors.store import Entry, Library
from vectors.store.checkpoint import Checkpoint
from vectors.tasks import Operation, Recipe, interference, materialise
from vectors.tasks.arithmetic import add, merged_by, scale
from vectors.tasks.interference import deltas_of
from vectors.tasks.merge import check_count
from vectors.tasks.sources import LibraryTerm
from workbench.merging.choose import Merging
from workbench.merging.made import note
from workbench.models.catalog import Model
from workbench.settings import Home

__all__ = ["composed", "interference_of", "materialised", "recipe_of", "save_recipe"]

Report = Callable[[float, str], None]


def recipe_of(library: Library, model: Model, terms: Sequence[TaskTerm]) -> Recipe:
    """Resolve task terms to one recipe on the model; linear recipes are opened into their terms.

    Raises:
        NameNotFound: no such task vector or recipe.
        ModelMismatch: one of another base.
        InputError: a recipe of another method than the sum, beside other terms.
    """
    recipes: list[Recipe] = []
    for term in terms:
        ref = term.name if term.revision is None else f"{term.name}@{term.revision}"
        entry = library.get(ref, kind=("task-vector", "recipe"))
        if entry.base != model.base:
            raise ModelMismatch(
                f"'{ref}' was made for base {(entry.base or '')[:12]}, not for {model.name} "
                f"({model.base[:12]}); use it with its own model."
            )
        if entry.kind == "recipe":
            recipe = library.load_recipe(ref)[1]
        else:
            recipe = Recipe(base=model.base, terms=((entry.digest, 1.0),))
        recipes.append(scale(recipe, term.weight))
    return recipes[0] if len(recipes) == 1 else add(Recipe(base=model.base, terms=()), *recipes)


def materialised(
    home: Home,
    library: Library,
    model: Model,
    terms: Sequence[TaskTerm],
    report: Report = lambda share, words: None,
) -> str:
    """Make sure that the weights of `terms` are on the disk; return the state's name.

    Merged on a CUDA device where that can be done (see `workbench.merging.choose`), which the folder
    notes in `workbench-made.json`.

    Raises:
        OutOfSpace: there is no room for them.
    """
    recipe = recipe_of(library, model, terms)
    if not recipe.terms:
        return "base"
    target = home.weights / recipe.digest
    if (target / "config.json").is_file():
        return recipe.digest
    home.weights.mkdir(parents=True, exist_ok=True)
    _make_room(home, model)
    merging = Merging()
    materialise(library, recipe, model.folder, target, report, merging.write_weights)
    if merging.made is not None:
        note(target, merging.made)
    return recipe.digest


def _make_room(home: Home, model: Model) -> None:
    """Drop the longest unused states, which can be made again, until one more fits."""
    need = model.bytes + (64 << 20)
    states = [f for f in home.weights.iterdir() if f.is_dir() and not f.name.startswith(".")]
    states.sort(key=lambda f: f.stat().st_mtime)
    # A few are kept for quick switching; an engine has read its own into memory already.
    while states and (len(states) >= 8 or shutil.disk_usage(home.weights).free < need):
        shutil.rmtree(states.pop(0), ignore_errors=True)
    if shutil.disk_usage(home.weights).free < need:
        raise OutOfSpace(
            f"The trained weights need {need >> 20} MB in {home.weights}, and "
            f"{shutil.disk_usage(home.weights).free >> 20} MB are free; free some space."
        )


def composed(
    library: Library,
    model: Model,
    terms: Sequence[TaskTerm],
    method: str = "linear",
    options: Mapping[str, Any] | None = None,
) -> Recipe:
    """Return the recipe of `terms`, merged by `method`.

    Raises:
        NameNotFound: no such method, task vector or recipe.
        InputError: options that the method does not have, too few terms for it, or a recipe of
            another method among the terms.
    """
    recipe = recipe_of(library, model, terms)
    if method != "linear" or options:
        recipe = merged_by(Operation.of(method, options or {}), recipe)
        check_count(recipe.op.row, len(recipe.terms))
    return recipe


def save_recipe(
    library: Library,
    model: Model,
    name: str,
    terms: Sequence[TaskTerm],
    method: str = "linear",
    options: Mapping[str, Any] | None = None,
) -> Entry:
    """Keep `terms`, merged by `method`, under `name` as a recipe.

    Raises:
        NameTaken: the name belongs to something else.
        NameNotFound: no such method, task vector or recipe.
        InputError: options that the method does not have, too few terms for it, or a recipe of
            another method among the terms.
    """
    recipe = composed(library, model, terms, method, options)
    return library.save_recipe(name, recipe, info={"written": format_tasks(terms)})


def interference_of(library: Library, model: Model, refs: Sequence[str]) -> dict[str, Any]:
    """Compare task vectors of `model` pair by pair, as plain JSON.

    Raises:
        NameNotFound: no such task vector.
        ModelMismatch: one of another base.
        InputError: fewer than two different ones.
    """
    checkpoint = Checkpoint(model.folder)
    terms: dict[str, LibraryTerm] = {}
    for ref in refs:
        entry = library.get(ref, kind=("task-vector",))
        task = library.task_by_digest(entry.digest, model.base)
        terms[ref] = LibraryTerm(ref, library, task, checkpoint)
    moved = [name for name in checkpoint if any(term.changes(name) for term in terms.values())]
    found = interference(list(terms), moved, deltas_of(checkpoint, list(terms.values())))
    return {
        "density": found.density,
        "norms": dict(found.norms),
        "whole": [asdict(pair) for pair in found.whole],
        "layers": {name: [asdict(p) for p in pairs] for name, pairs in found.layers.items()},
    }
