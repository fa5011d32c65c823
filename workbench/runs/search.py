"""A run that searches the coefficients of a recipe's ingredients, and may keep the best ones."""

from __future__ import annotations

from typing import Any

from vectors.errors import InputError
from vectors.grammar import parse_tasks
from vectors.store import Library
from vectors.tasks import Recipe
from workbench.engines.weights import composed
from workbench.runs.process import Progress
from workbench.search.behaviours import parse_behaviours
from workbench.search.exam import Exam
from workbench.search.keep import keep_best
from workbench.search.live import LiveModel
from workbench.search.marks import Marks
from workbench.search.names import called, ingredients_of
from workbench.search.search import Search
from workbench.service import Workbench

__all__ = ["search_run"]

Parameters = dict[str, Any]


def search_run(workbench: Workbench, p: Parameters, progress: Progress) -> dict[str, Any]:
    """Measure the coefficients in memory, name the best, and keep them where a name is given."""
    info = workbench.model(progress.part(0, 0.02))
    library: Library = workbench.library
    terms = parse_tasks(p["recipe"])
    recipe = composed(library, info, terms, p["method"], p["options"])
    refs = [t.name if t.revision is None else f"{t.name}@{t.revision}" for t in terms]
    ingredients = ingredients_of(library, recipe, called(library, refs))
    if not ingredients:
        raise InputError(f"The recipe '{p['recipe']}' has no ingredients; name a task vector.")
    weights = parse_behaviours(p["behaviours"])
    sets = {name: workbench.contrast.get(name) for name in weights}
    progress(0.02, "loading the model")
    scratch = progress.folder or workbench.home.runs
    live = LiveModel(info, library, scratch)
    progress(0.06, "reading general text")
    exam = Exam(live, sets, progress, pairs=p["pairs"])

    def measure(at: Recipe) -> Marks:
        with live.of(at):
            return exam.take()

    search = Search(
        recipe, ingredients, weights, measure, p["budget"], progress.part(0.1, 0.99), progress.event
    )
    found = search.run(p["way"], p["coefficients"], p["ranges"])
    result: dict[str, Any] = {
        "recipe": p["recipe"],
        "method": recipe.op.method,
        "options": recipe.op.options,
        "way": p["way"],
        "model": info.name,
        "base_digest": recipe.base,
        "ingredients": [
            {"name": i.name, "weight": i.weight, "digest": i.digest} for i in ingredients
        ],
        **found.to_json(),
    }
    wanted = p["name"] and found.best.terms
    return {**result, "kept": keep_best(library, result, p["name"]) if wanted else None}
