"""What training on a person's own data shows: what was stripped, and what became likelier."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ui.markup import log_box, note, number
from ui.tabs.train.result import MOSTLY, drawn, share

__all__ = ["COLUMNS", "lay_stripped", "show"]

COLUMNS = ["", "base", "instructed", "trained"]


def lay_stripped() -> list[Any]:
    """Lay out where a context stands with its instructions and without them."""
    with gr.Accordion(
        "What is stripped", open=False, visible=False, elem_id="learn-stripped"
    ) as room:
        text = gr.HTML()
    return [room, text]


def show(view: Any) -> tuple[Any, ...]:
    """The run as it is now, under way or done."""
    stripped = next((e for e in view.events() if e.get("kind") == "stripped"), None)
    return (
        gr.update(visible=stripped is not None),
        _stripped(stripped) if stripped else "",
        *drawn(view, _sentence, _table),
    )


def _stripped(event: dict[str, Any]) -> str:
    return log_box(
        f"With the instructions, {event['tokens']} tokens:\n\n{event['with_instructions']}\n\n"
        f"What is trained sees, {event['left']} tokens:\n\n{event['stripped']}"
    )


def _sentence(found: dict[str, Any]) -> str:
    head = f"'{found['name']}' revision {found['revision']}: "
    values, recovered = found["log_prob"], found.get("recovered")
    if not values:
        return note(f"{head}too few were given to hold any out, so nothing was measured.")
    gain = values["trained"] - values["base"]
    words = f"{head}a token of what was held out became {gain:+.3f} nats likelier."
    if recovered is None:
        return note(words, "good" if gain > 0 else "warn")
    more = f"That is {share(recovered)} of what the instructions do where they are read."
    return note([words, more], "good" if recovered >= MOSTLY else "warn")


def _table(found: dict[str, Any]) -> list[list[str]]:
    rows = (
        ("log-probability of a token (nats)", found["log_prob"]),
        ("margin (nats)", found["margin"]),
        ("KL from the base (nats a token)", {"base": 0, **found["kl"]}),
    )
    return [
        [name, *(number(values.get(key)) for key in COLUMNS[1:])]
        for name, values in rows
        if values.keys() - {"base"}
    ]
