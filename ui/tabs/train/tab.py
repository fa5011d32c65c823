"""The tab's layout and its events."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ui.choices import VECTORS, listed, missing, vector_choice
from ui.forms import QUIET, say, told
from ui.help import guide, help_for
from ui.markup import lead, note
from ui.panel import RunPanel
from ui.reload import remember
from ui.session import Session
from ui.tabs.train.own_data import own_data
from ui.tabs.train.result import MARGINS, lay_result, show
from ui.tabs.train.settings import lay_settings, name_of_result, parameters

__all__ = ["build"]


def build(session: Session) -> gr.Tab:
    """Lay the tab out and wire it."""
    with gr.Tab("Train", id="train", elem_id="tab-train") as tab:
        gr.HTML(lead(guide("Train")))
        with gr.Row():
            vector = vector_choice("train-vector", "Verified ones come first.")
            name = name_of_result("train", "the vector's name and -baked")
            dose = gr.Textbox(
                label="Dose", info=help_for("train dose"), max_length=20, elem_id="train-dose"
            )
        room, settings = lay_settings("train", "prompts")
        with room:
            read_pairs = gr.Checkbox(
                True,
                label="Learn from the set's own texts, too",
                info=help_for("read pairs"),
                elem_id="train-read-pairs",
            )
        panel = RunPanel(session, "train")
        result = lay_result("train", MARGINS)
        own_data(session, tab)

    fields = [name, dose, read_pairs, *settings]
    panel.wire(parameters, [vector, *fields], show, result)

    def refresh(value: str | None) -> tuple[Any, ...]:
        update = listed(session, value, *VECTORS, verified_first=True)
        words = missing(update, VECTORS)
        box = say(note(words, "plain")) if words else _unverified(session, update["value"])
        return (box, update)

    def chosen(value: str | None) -> tuple[Any, ...]:
        return (_unverified(session, value),)

    session.on_show(tab, refresh, [vector], panel.notice, [vector])
    vector.input(told(0)(chosen), vector, panel.notice, **QUIET)
    remember(session.page, [vector], fields)
    return tab


def _unverified(session: Session, vector: str | None) -> Any:
    """Warn of a vector that may be noise."""
    if not vector:
        return say()
    found = session.wb.verdict(vector)
    if found is None:
        return say(
            note(f"'{vector}' was never verified; verify it first, or train on what may be noise.")
        )
    if not found["passed"]:
        return say(note(f"'{vector}' did not pass its verification; training bakes that in."))
    return say()
