"""Find the change that did it: two entries, what tells them apart, and the run between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from ui.choices import TASKS
from ui.forms import STILL, as_number, changed, told, typed
from ui.help import help_for
from ui.markup import lead
from ui.panel import RunPanel
from ui.reload import recall, remember
from ui.session import Session
from ui.tabs.library.found import lay_found, show_found
from ui.tabs.library.shelf import Shelf
from vectors.errors import InputError

__all__ = ["BASE", "GENERAL", "bisect", "offered", "parameters"]

# Neither can be a name: names have no spaces.
BASE, GENERAL = "the base", "loss on general text"
MOST_REVISIONS = 30
OVER = [("what fits", "auto"), ("its history", "history"), ("its ingredients", "ingredients")]


def bisect(session: Session, shelf: Shelf, tab: gr.Tab) -> None:
    """Lay the part out and wire it."""
    with gr.Accordion("Find the change that did it", open=False, elem_id="library-bisect"):
        gr.HTML(
            lead(
                "Between a good entry and a bad one, halving finds the revision, or the ingredient, "
                "that changed a behaviour, in few measurements."
            )
        )
        with gr.Row():
            good = _entry("Good", "good entry", "bisect-good")
            bad = _entry("Bad", "bad entry", "bisect-bad")
        with gr.Row():
            behaviour = gr.Dropdown(
                [],
                label="Behaviour",
                info=help_for("telling behaviour"),
                min_width=240,
                elem_id="bisect-behaviour",
            )
            threshold = gr.Textbox(
                label="Threshold",
                info=help_for("threshold"),
                placeholder="half way",
                max_length=20,
                elem_id="bisect-threshold",
            )
            over = gr.Radio(
                OVER,
                value="auto",
                label="Look through",
                info=help_for("over"),
                elem_id="bisect-over",
            )
        panel = RunPanel(session, "bisect")
        found = lay_found("bisect")

    def offer(*values: str | None) -> tuple[Any, ...]:
        return offered(session, *(typed(value) for value in values))

    def follow(*values: str | None) -> tuple[Any, ...]:
        return changed(offer(*values), values)

    chosen = [good, bad, behaviour]
    panel.wire(parameters, [*chosen, threshold, over], show_found, found)
    session.on_show(tab, offer, chosen, panel.notice, chosen)
    shelf.table.change(
        told(3)(follow),
        chosen,
        [panel.notice, *chosen],
        js=recall(chosen),
        preprocess=False,
        **STILL,
    )
    remember(session.page, chosen, [threshold, over])


def _entry(label: str, word: str, elem_id: str) -> gr.Dropdown:
    return gr.Dropdown(
        [],
        label=label,
        info=help_for(word),
        allow_custom_value=True,
        min_width=240,
        elem_id=elem_id,
    )


def offered(session: Session, good: str, bad: str, behaviour: str) -> tuple[Any, Any, Any]:
    """The three lists' updates; what was chosen stays while it exists.

    At first bad is the newest entry of this model, and good the revision before it, or the base.
    """
    rows = [
        row
        for row in session.wb.library_rows()
        if row["kind"] in TASKS and (not session.base or row["base"] == session.base)
    ]
    rows.sort(key=lambda row: str(row["created"]), reverse=True)
    names = {row["name"]: int(row["revision"]) for row in rows}
    entries = [ref for name, newest in names.items() for ref in _revisions(name, newest)]
    if bad.partition("@")[0] not in names:
        bad = next(iter(names), "")
    if good != BASE and good.partition("@")[0] not in names:
        newest = names.get(bad, 1)
        good = f"{bad}@{newest - 1}" if newest > 1 else BASE
    sets = [GENERAL, *session.wb.contrast.names()]
    return (
        gr.update(choices=_with(good, [BASE, *entries]), value=good),
        gr.update(choices=_with(bad, entries), value=bad or None),
        gr.update(choices=sets, value=behaviour if behaviour in sets else sets[1]),
    )


def _revisions(name: str, newest: int) -> list[str]:
    """The name, and its older revisions, the newest first."""
    older = range(newest - 1, max(0, newest - 1 - MOST_REVISIONS), -1)
    return [name, *(f"{name}@{number}" for number in older)]


def _with(value: str, choices: Sequence[str]) -> list[str]:
    return [*choices, value] if value and value not in choices else list(choices)


def parameters(
    good: str | None,
    bad: str | None,
    behaviour: str | None,
    threshold: str | None,
    over: str | None,
) -> dict[str, Any]:
    """What the fields say, as parameters of the run.

    Raises:
        InputError: an entry that is missing, or a threshold that is not a number.
    """
    first, last = typed(good), typed(bad)
    if not first or not last:
        raise InputError("Choose a good and a bad entry first; the Train tab makes them.")
    if last == BASE:
        raise InputError("The base can only be the good side; choose an entry for the bad one.")
    level = as_number(threshold, "threshold")
    return {
        "entries": last if first == BASE else f"{first}..{last}",
        "behaviour": "" if behaviour == GENERAL else typed(behaviour),
        "over": over or "auto",
        **({} if level is None else {"threshold": level}),
    }
