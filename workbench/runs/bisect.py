"""A run that finds the version, or the ingredient, that changed a behaviour."""

from __future__ import annotations

import time
from typing import Any

from vectors.errors import ModelMismatch
from vectors.store import Entry, Library
from vectors.tasks import Recipe
from workbench.models.catalog import Model
from workbench.runs.process import Progress
from workbench.search.between import (
    TASKS,
    Over,
    changes_between,
    parse_between,
    recipe_at,
    revisions_between,
)
from workbench.search.bisect import Bisection, State, Test
from workbench.search.culprit import in_history, in_ingredients
from workbench.search.exam import Exam
from workbench.search.live import LiveModel
from workbench.search.marks import Marks
from workbench.search.names import called
from workbench.search.search import Ingredient
from workbench.service import Workbench

__all__ = ["bisect_run"]

Parameters = dict[str, Any]


def bisect_run(workbench: Workbench, p: Parameters, progress: Progress) -> dict[str, Any]:
    """Measure as few states as are needed, in memory, and name the one that changed."""
    started = time.monotonic()
    info = workbench.model(progress.part(0, 0.02))
    library: Library = workbench.library
    good, bad, over = parse_between(p["entries"], p["over"])
    states, changes = _row(library, info, good, bad, over)
    name = p["behaviour"]
    sets = {name: workbench.contrast.get(name)} if name else {}
    progress(0.02, "loading the model")
    live = LiveModel(info, library, progress.folder or workbench.home.runs)
    exam = Exam(live, sets, progress, general=not name)

    def measure(recipe: Recipe) -> Marks:
        with live.of(recipe):
            return exam.take()

    search = Bisection(Test(name, p["threshold"]), measure, progress.part(0.1, 1), progress.event)
    if over == "history":
        found = in_history(search, states)
    else:
        found = in_ingredients(search, states[0], states[-1], changes)
    return {
        "entries": p["entries"],
        "good": states[0].name,
        "bad": states[-1].name,
        "states": len(changes) or len(states),
        **found,
        **search.to_json(),
        "model": info.name,
        "seconds": time.monotonic() - started,
    }


def _row(
    library: Library, info: Model, good: str, bad: str, over: Over
) -> tuple[list[State], list[Ingredient]]:
    """The revisions; or both ends, and the ingredients in which they differ."""
    if over == "history":
        entries = revisions_between(library, good, bad)
        return [_state(library, info, f"{e.name}@{e.revision}", e) for e in entries], []
    base = State("the base", Recipe(base=info.base, terms=()))
    states = [_state(library, info, ref) if ref else base for ref in (good, bad)]
    refs = [ref for ref in (bad, good) if ref]
    return states, changes_between(library, states[0], states[-1], called(library, refs))


def _state(library: Library, info: Model, ref: str, entry: Entry | None = None) -> State:
    found = library.get(ref, kind=TASKS) if entry is None else entry
    if found.base != info.base:
        raise ModelMismatch(
            f"'{ref}' was made for base {(found.base or 'none')[:12]}, not for {info.name} "
            f"({info.base[:12]}); choose entries of one model."
        )
    return State(ref, recipe_at(library, found))
