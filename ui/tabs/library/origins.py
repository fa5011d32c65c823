"""Where the chosen entry comes from, and what was made of it, as a picture."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ui.forms import STILL, notice, say, told
from ui.markup import lead, note, when
from ui.session import Session
from ui.tabs.library import pictures
from ui.tabs.library.shelf import named

__all__ = ["origins"]

ROWS = ["entry", "kind", "made", "made of", "runs"]


def origins(session: Session, entry: gr.Dropdown) -> None:
    """Lay the part out; it is drawn when it is opened, and again when another entry is chosen."""
    with gr.Accordion("Lineage", open=False, elem_id="library-lineage") as part:
        gr.HTML(
            lead(
                "What the chosen entry comes from, its revisions, what was made of them, and the "
                "runs that did it."
            )
        )
        box = notice("library-lineage-notice")
        chart = gr.Plot(label="Lineage", elem_id="library-lineage-chart")
        with gr.Accordion("The same as a table", open=False, elem_id="library-lineage-twin"):
            table = gr.Dataframe(
                headers=ROWS, datatype="str", interactive=False, elem_id="library-lineage-table"
            )
    seen = gr.State(False)

    def draw(name: str | None) -> tuple[Any, ...]:
        words, chart, rows = drawn(session, named(name))
        return words, True, chart, rows

    def follow(name: str | None, is_open: bool) -> tuple[Any, ...]:
        return drawn(session, name) if is_open and name else (gr.skip(), gr.skip())

    def closed() -> tuple[Any, ...]:
        return say(), False

    part.expand(told(3)(draw), entry, [box, seen, chart, table], **STILL)
    part.collapse(closed, None, [box, seen], **STILL)
    entry.change(told(2)(follow), [entry, seen], [box, chart, table], **STILL)


def drawn(session: Session, name: str) -> tuple[Any, ...]:
    """A sentence where something is left out, the picture, and its rows."""
    found = session.wb.lineage(name)
    made: dict[str, list[str]] = {}
    runs: dict[str, list[str]] = {}
    for link in found["links"]:
        weight = "" if link["weight"] is None else f" x {link['weight']:g}"
        if link["how"] == "made of":
            made.setdefault(link["target"], []).append(link["source"] + weight)
        elif link["how"] == "made by":
            runs.setdefault(link["target"], []).append(f"made by {link['source']}")
        elif link["how"] == "measured by":
            runs.setdefault(link["source"], []).append(f"measured by {link['target']}")
    rows = [
        [
            place["key"], place["kind"], when(place["created"]),
            ", ".join(made.get(place["key"], [])), ", ".join(runs.get(place["key"], [])),
        ]
        for place in found["places"]
    ]  # fmt: skip
    left = found["left_out"]
    words = note(f"{left} more are related and not shown.", "plain") if left else ""
    return say(words), pictures.lineage(found), rows
