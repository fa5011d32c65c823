"""Search the coefficients of task vectors: form, run, curves, and a click that keeps the best recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from ui.choices import TASKS
from ui.forms import QUIET, STILL, as_number, as_numbers, changed, notice, say, told, typed
from ui.help import help_for
from ui.markup import lead, note
from ui.panel import RunPanel
from ui.reload import recall, remember
from ui.session import Session
from ui.tabs.library.found import lay_found, show_found
from ui.tabs.library.shelf import Shelf, filled
from vectors.errors import InputError, NameNotFound

__all__ = ["STANDARD", "WAYS", "kept", "offered", "parameters", "search", "show"]

STANDARD = "0.25, 0.5, 0.75, 1, 1.25, 1.5, 2"
BUDGET = "0.5"
WAYS = [
    ("one coefficient for all", "together"),
    ("one task vector after the other", "each"),
    ("every combination", "grid"),
]
FALLS = "=-1"


def search(session: Session, shelf: Shelf, tab: gr.Tab) -> None:
    """Lay the part out and wire it."""
    with gr.Accordion("Search the coefficients", open=False, elem_id="library-search"):
        gr.HTML(
            lead(
                "How much of each task vector is best: too little does too little, and too much "
                "spoils the rest. Half of the held-out pairs choose, and the others confirm."
            )
        )
        chosen, fields = _lay_fields()
        panel = RunPanel(session, "search")
        found = lay_found("search")
        box = notice("search-kept")
        with gr.Row(visible=False, elem_id="search-best") as best:
            name = gr.Textbox(
                label="Name of the recipe",
                info=help_for("recipe name"),
                placeholder="the first task vector's name and -best",
                max_length=100,
                elem_id="search-name",
            )
            keep = gr.Button(
                "Keep the best recipe", variant="primary", scale=0, min_width=230,
                elem_id="search-keep",
            )  # fmt: skip

    def offer(recipe: list[str] | None, behaviours: list[str] | None) -> tuple[Any, ...]:
        return offered(session, recipe or [], behaviours or [])

    def follow(*values: list[str] | None) -> tuple[Any, ...]:
        return changed(offer(*values), values)

    def keep_it(run_id: str, called: str | None) -> tuple[Any, ...]:
        made = kept(session, run_id, typed(called))
        words = f"Kept '{made['name']}' revision {made['revision']}: {made['terms']}."
        return say(note(words, "good")), *filled(session, made["name"])

    panel.wire(parameters, [*chosen, *fields], show, [*found, best])
    session.on_show(tab, offer, chosen, panel.notice, chosen)
    shelf.table.change(
        told(2)(follow),
        chosen,
        [panel.notice, *chosen],
        js=recall(chosen),
        preprocess=False,
        **STILL,
    )
    keep.click(told(3)(keep_it), [panel.run_id, name], [box, *shelf.parts], **QUIET)
    remember(session.page, chosen, [*fields, name])


def _lay_fields() -> tuple[list[gr.Dropdown], list[Any]]:
    with gr.Row():
        recipe = _many("Task vectors or a recipe", "searched", "search-recipe")
        behaviours = _many("Behaviours", "behaviours", "search-behaviours")
    with gr.Row():
        way = gr.Radio(
            WAYS, value="together", label="Way", info=help_for("way"), elem_id="search-way"
        )
        coefficients = gr.Textbox(
            label="Coefficients",
            info=help_for("coefficients"),
            placeholder=STANDARD,
            max_length=400,
            elem_id="search-coefficients",
        )
    with gr.Accordion("Settings", open=False, elem_id="search-settings"), gr.Row():
        ranges = gr.Textbox(
            label="Coefficients of their own",
            info=help_for("ranges"),
            placeholder="cheerful-baked: -1, 0, 0.5, 1",
            lines=3,
            max_length=4000,
            elem_id="search-ranges",
        )
        pairs = gr.Textbox(
            label="Held-out pairs",
            info=help_for("held-out pairs"),
            placeholder="all",
            max_length=20,
            elem_id="search-pairs",
        )
        budget = gr.Textbox(
            label="Budget",
            info=help_for("budget"),
            placeholder=BUDGET,
            max_length=20,
            elem_id="search-budget",
        )
    return [recipe, behaviours], [way, coefficients, ranges, pairs, budget]


def _many(label: str, word: str, elem_id: str) -> gr.Dropdown:
    """A list from which several are taken, and into which more can be typed."""
    return gr.Dropdown(
        [],
        multiselect=True,
        allow_custom_value=True,
        label=label,
        info=help_for(word),
        min_width=240,
        elem_id=elem_id,
    )


def offered(session: Session, recipe: Sequence[str], behaviours: Sequence[str]) -> tuple[Any, Any]:
    """Both lists' updates: what was chosen stays while it exists, else the newest of this model and
    the behaviour that it was made for."""
    rows = [
        row
        for row in session.wb.library_rows()
        if row["kind"] in TASKS and (not session.base or row["base"] == session.base)
    ]
    rows.sort(key=lambda row: str(row["created"]), reverse=True)
    names = [row["name"] for row in rows]
    now = [term for term in recipe if _name_of(term) in names] or names[:1]
    sets = session.wb.contrast.names()
    wanted = [text for text in behaviours if text] or [_behaviour_of(session, now, sets)]
    ways = [(f"{name} should {verb}", name + end) for name in sets
            for verb, end in (("rise", ""), ("fall", FALLS))]  # fmt: skip
    return (
        gr.update(choices=[*names, *(term for term in now if term not in names)], value=now),
        gr.update(choices=ways, value=wanted),
    )


def _name_of(term: str) -> str:
    return term.partition("=")[0].partition("@")[0].strip()


def _behaviour_of(session: Session, terms: Sequence[str], sets: Sequence[str]) -> str:
    """The set that the first task vector was made from, where that is known."""
    name = ""
    try:
        made = session.wb.library.get(_name_of(terms[0])).info.get("contrast") if terms else None
        name = str(made.get("name", "")) if isinstance(made, dict) else ""
    except NameNotFound:
        pass
    return name if name in sets else sets[0]


def parameters(
    recipe: Sequence[str] | None,
    behaviours: Sequence[str] | None,
    way: str | None,
    coefficients: str | None,
    ranges: str | None,
    pairs: str | None,
    budget: str | None,
) -> dict[str, Any]:
    """What the fields say, as parameters of the run; an empty field is left to its default.

    Raises:
        InputError: nothing to search, nothing to measure, or text where a number should be.
    """
    if not recipe:
        raise InputError("Choose a task vector or a recipe first; the Train tab makes them.")
    if not behaviours:
        raise InputError("Choose at least one behaviour, by whose held-out pairs it is judged.")
    given = {
        "coefficients": as_numbers(coefficients, "coefficient", "1") or None,
        "ranges": _ranges(typed(ranges)) or None,
        "pairs": as_number(pairs, "number of held-out pairs", "12"),
        "budget": as_number(budget, "budget", BUDGET),
    }
    return {
        "recipe": ",".join(recipe),
        "behaviours": list(behaviours),
        "way": way or "together",
        **{name: value for name, value in given.items() if value is not None},
    }


def _ranges(text: str) -> dict[str, list[float]]:
    """One task vector a line, with its coefficients after a colon."""
    found: dict[str, list[float]] = {}
    for line in filter(None, (line.strip() for line in text.splitlines())):
        name, given, numbers = line.partition(":")
        named = name.strip()
        found[named] = as_numbers(numbers, f"coefficient of {named[:40]!r}", "1")
        if not given or not found[named]:
            raise InputError(
                f"{line[:60]!r} names no coefficients; write a task vector, a colon and numbers, "
                "as in cheerful-baked: 0, 0.5, 1."
            )
    return found


def show(view: Any) -> tuple[Any, ...]:
    """What was found so far, and whether there is a recipe to keep."""
    best = view.result().get("best") if view.state.state == "done" else None
    return *show_found(view), gr.update(visible=bool(best and best.get("terms")))


def kept(session: Session, run_id: str, name: str) -> dict[str, Any]:
    """Keep the best recipe of a search, as its first task vector's name and -best where no name is
    given.

    Raises:
        InputError, NameTaken, NameNotFound: see `Workbench.keep_best`.
    """
    best = session.wb.runs.get(run_id).result().get("best") or {}
    terms = str(best.get("terms", ""))
    return {**session.wb.keep_best(run_id, name or f"{_name_of(terms)}-best"), "terms": terms}
