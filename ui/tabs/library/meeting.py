"""How the task vectors of a recipe would get in each other's way, before they are merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from ui.forms import notice, say, told
from ui.markup import lead, note, number
from ui.session import Session
from ui.tabs.library import pictures
from vectors.errors import InputError

__all__ = ["meeting", "met"]

ROWS = ["layer", "task vector", "and", "cosine", "sign conflict", "overlap"]


def meeting(session: Session, chosen: gr.Dropdown) -> None:
    """Lay the part out and wire it."""
    with gr.Accordion("Interference, before merging", open=False, elem_id="library-meeting"):
        gr.HTML(
            lead(
                "Where two task vectors pull apart (cosine below 0, signs in conflict) a sum takes "
                "from both; where their largest changes overlap, they work in the same place."
            )
        )
        look = gr.Button("Look at these task vectors", elem_id="library-interference")
        box = notice("library-interference-notice")
        with gr.Column(visible=False) as result:
            chart = gr.Plot(label="Interference", elem_id="library-interference-chart")
            with gr.Accordion(
                "The same as a table", open=False, elem_id="library-interference-twin"
            ):
                table = gr.Dataframe(
                    headers=ROWS,
                    datatype="str",
                    interactive=False,
                    max_height=420,
                    elem_id="library-interference-table",
                )

    def show(names: list[str] | None) -> tuple[Any, ...]:
        return met(session, names or [])

    outputs = [box, result, chart, table]
    look.click(told(3)(show), chosen, outputs, api_visibility="private", concurrency_limit=1)


def met(session: Session, names: Sequence[str]) -> tuple[Any, ...]:
    """The sentence, the heat maps and their rows; recipes are opened into their task vectors.

    Raises:
        InputError: fewer than two task vectors.
    """
    tasks = list(dict.fromkeys(task for name in names for task in _tasks(session, name)))
    if len(tasks) < 2:
        raise InputError("Interference is between task vectors; choose at least two.")
    found = session.wb.interference(",".join(tasks))
    worst = min(found["whole"], key=lambda pair: pair["cosine"])
    words = (
        f"Over the whole model '{worst['first']}' and '{worst['second']}' get on worst: cosine "
        f"{number(worst['cosine'])}, {worst['conflict']:.0%} of the elements that both move in "
        "conflict."
    )
    shown = gr.update(visible=True)
    return say(note(words, "plain")), shown, pictures.interference(found), pictures.table_of(found)


def _tasks(session: Session, name: str) -> list[str]:
    if session.wb.library.get(name).kind != "recipe":
        return [name]
    return [term["name"] for term in session.wb.parts(name)["terms"]]
