"""Make a recipe: a sum of task vectors, a negated one, a scaled one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from ui.forms import QUIET, say, told, typed
from ui.help import help_for
from ui.markup import lead, note
from ui.session import Session
from ui.tabs.library.shelf import Shelf, filled, named
from vectors.errors import InputError

__all__ = ["recipes"]


def recipes(session: Session, shelf: Shelf) -> None:
    """Lay the part out and wire it."""
    wb = session.wb
    with gr.Accordion("Make a recipe of task vectors", open=False, elem_id="library-recipes"):
        gr.HTML(
            lead(
                "A recipe is a sum of task vectors, worked out from the untrained model; leaving "
                "one out removes its behaviour exactly."
            )
        )
        with gr.Row():
            terms = gr.Textbox(
                label="Task vectors",
                info=help_for("terms"),
                placeholder="cheerful-baked=1,formal-baked=-0.5",
                max_length=2000,
                elem_id="library-terms",
            )
            weight = gr.Number(
                0.5, label="Weight", info=help_for("scale"), elem_id="library-weight"
            )
            name = gr.Textbox(
                label="Name of the recipe", max_length=100, elem_id="library-recipe-name"
            )
        with gr.Row():
            combine = gr.Button("Combine the task vectors", elem_id="library-combine")
            negate = gr.Button("Negate the chosen entry", elem_id="library-negate")
            scale = gr.Button("Scale the chosen entry", elem_id="library-scale")

    def kept(make: Callable[[], dict[str, Any]]) -> tuple[Any, ...]:
        made = make()
        words = f"Kept '{made['name']}' revision {made['revision']}: {made['terms']}."
        return (say(note(words, "good")), *filled(session, made["name"]))

    def combined(text: str, called: str) -> tuple[Any, ...]:
        return kept(lambda: wb.combine(typed(called), typed(text)))

    def negated(chosen: str | None, called: str) -> tuple[Any, ...]:
        return kept(lambda: wb.negate(named(chosen), typed(called)))

    def scaled(chosen: str | None, by: float | None, called: str) -> tuple[Any, ...]:
        if by is None:
            raise InputError("Give a weight; 1 is as trained.")
        return kept(lambda: wb.scale(named(chosen), by, typed(called)))

    combine.click(told(3)(combined), [terms, name], shelf.outputs, **QUIET)
    negate.click(told(3)(negated), [shelf.entry, name], shelf.outputs, **QUIET)
    scale.click(told(3)(scaled), [shelf.entry, weight, name], shelf.outputs, **QUIET)
