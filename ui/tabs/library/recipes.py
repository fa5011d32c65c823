"""Recipes: task vectors with a slider each, a merge method with its options, and what would meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from ui.choices import TASKS
from ui.forms import QUIET, STILL, notice, say, told, typed
from ui.help import help_for
from ui.markup import lead, note
from ui.session import Session
from ui.tabs.library.meeting import meeting
from ui.tabs.library.options import Options
from ui.tabs.library.shelf import Shelf, filled, named
from vectors.errors import InputError

__all__ = ["MOST", "edited", "ingredients", "kept", "recipes", "weighed", "written"]

MOST = 8
"""Sliders on the page; the command line takes more."""
WIDE = 2.0


def recipes(session: Session, shelf: Shelf, tab: gr.Tab) -> None:
    """Lay the part out and wire it."""
    with gr.Accordion("Make or edit a recipe", open=False, elem_id="library-recipes"):
        gr.HTML(
            lead(
                "A recipe merges task vectors. It is worked out from the untrained model each time, "
                "so leaving one out removes its behaviour exactly."
            )
        )
        box = notice("library-recipe-notice")
        with gr.Row():
            chosen = gr.Dropdown(
                [],
                multiselect=True,
                max_choices=MOST,
                label="Task vectors",
                info=help_for("ingredients"),
                scale=3,
                elem_id="library-ingredients",
            )
            edit = gr.Button(
                "Edit the chosen recipe", scale=0, min_width=200, elem_id="library-edit"
            )
        sliders = [
            gr.Slider(-WIDE, WIDE, 1.0, step=0.01, visible=False, elem_id=f"library-weight-{index}")
            for index in range(MOST)
        ]
        options = Options(session)
        meeting(session, chosen)
        with gr.Row():
            name = gr.Textbox(
                label="Name of the recipe",
                info=help_for("recipe name"),
                max_length=100,
                elem_id="library-recipe-name",
            )
            keep = gr.Button(
                "Keep the recipe", variant="primary", scale=0, min_width=200,
                elem_id="library-combine",
            )  # fmt: skip
    weighed_names = gr.State([])

    def offer(now: list[str] | None) -> tuple[Any, ...]:
        return (ingredients(session, now or []),)

    def weigh(now: list[str] | None, before: list[str], *values: Any) -> tuple[Any, ...]:
        return weighed(now or [], before, values)

    def edit_chosen(entry: str | None) -> tuple[Any, ...]:
        found = session.wb.parts(named(entry))
        return edited(session, found, options)

    def keep_it(called: str, names: list[str] | None, *values: Any) -> tuple[Any, ...]:
        weights, (method, *rest) = values[:MOST], values[MOST:]
        made = kept(session, typed(called), names or [], weights, options.read(method, *rest))
        words = f"Kept '{made['name']}' revision {made['revision']}: {made['terms']}"
        return (
            say(note(f"{words}, by {made['method']}.", "good")),
            *filled(session, made["name"]),
        )

    session.on_show(tab, offer, [chosen], box, [chosen])
    shelf.table.change(told(1)(offer), chosen, [box, chosen], **STILL)
    chosen.change(weigh, [chosen, weighed_names, *sliders], [weighed_names, *sliders], **STILL)
    filled_by_edit = [chosen, weighed_names, *sliders, options.method, *options.outputs, name]
    edit.click(told(len(filled_by_edit))(edit_chosen), shelf.entry, [box, *filled_by_edit], **STILL)
    inputs = [name, weighed_names, *sliders, *options.inputs]
    keep.click(told(3)(keep_it), inputs, shelf.outputs, **QUIET)


def ingredients(session: Session, now: Sequence[str]) -> Any:
    """The list's update: what this model can merge; what was chosen stays."""
    rows = [
        row
        for row in session.wb.library_rows()
        if row["kind"] in TASKS and (not session.base or row["base"] == session.base)
    ]
    rows.sort(key=lambda row: str(row["created"]), reverse=True)
    names = [row["name"] for row in rows]
    living = {row["name"] for row in rows}
    # A recipe may name an older revision, or one without a name.
    stay = [name for name in now if name.partition("@")[0] in living or "@" in name]
    return gr.update(choices=[*names, *(n for n in stay if n not in living)], value=stay)


def weighed(now: Sequence[str], before: Sequence[str], values: Sequence[Any]) -> tuple[Any, ...]:
    """The names, and a slider for each; those that stay keep their weights."""
    known = dict(zip(before, values, strict=False))
    return _sliders([(name, known.get(name)) for name in now[:MOST]])


def _sliders(terms: Sequence[tuple[str, float | None]]) -> tuple[Any, ...]:
    shown = [
        gr.update(
            visible=True,
            label=name,
            value=1.0 if weight is None else weight,
            minimum=-max(WIDE, abs(weight or 0.0)),
            maximum=max(WIDE, abs(weight or 0.0)),
        )
        for name, weight in terms
    ]
    hidden = [gr.update(visible=False)] * (MOST - len(shown))
    return [name for name, _ in terms], *shown, *hidden


def edited(session: Session, found: dict[str, Any], options: Options) -> tuple[Any, ...]:
    """Fill the whole form with a recipe.

    Raises:
        InputError: a recipe with more task vectors than there are sliders.
    """
    terms = [(term["name"], term["weight"]) for term in found["terms"]]
    if len(terms) > MOST:
        raise InputError(
            f"'{found['name']}' has {len(terms)} task vectors, and the page has {MOST} sliders; "
            "use `workbench library merge`."
        )
    names = [name for name, _ in terms]
    choices = ingredients(session, names)
    more = [name for name in names if name not in choices["choices"]]
    chosen = gr.update(choices=[*choices["choices"], *more], value=names)
    method = found["method"]
    return (
        chosen,
        *_sliders(terms),
        gr.update(value=method),
        *options.shown(method, found["options"]),
        found["name"],
    )


def written(names: Sequence[str], weights: Sequence[Any]) -> str:
    """Names and sliders as task terms.

    Raises:
        InputError: none is chosen.
    """
    if not names:
        raise InputError("Choose task vectors first; the Train tab makes them.")
    pairs = zip(names, weights, strict=False)
    # A slider that was never drawn has no value, and stands at 1. Steps of 0.01 leave dust.
    return ",".join(f"{n}={1.0 if w is None else round(float(w), 6):g}" for n, w in pairs)


def kept(
    session: Session,
    name: str,
    names: Sequence[str],
    weights: Sequence[Any],
    method: tuple[str, dict[str, Any]],
) -> dict[str, Any]:
    """Keep what the form says as a recipe."""
    terms = written(names, weights)
    return session.wb.combine(name, terms, *method)
