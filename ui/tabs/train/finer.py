"""The settings that a training seldom needs: tier, contexts, rank, batch, when to stop, what to keep."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ui.help import help_for
from ui.tabs.train.numbers import lay_numbers, numbers_of

__all__ = ["finer_of", "lay_finer"]

CHOICES = {
    "tier": (
        "Tier",
        [
            ("chosen by the data", "auto"),
            ("1: the gradient goes through the context", "1"),
            ("2: the context is frozen", "2"),
            ("3: as 1, in less memory", "3"),
        ],
    ),
    "reuse": (
        "Contexts",
        [
            ("read at every step", "off"),
            ("kept where the model is", "device"),
            ("kept in main memory", "host"),
            ("kept on the disk", "disk"),
        ],
    ),
    "keep": (
        "Weights to keep",
        [
            ("the best, and the last beside them", "both"),
            ("the best on held-out decisions", "best"),
            ("the last", "last"),
        ],
    ),
}
NUMBERS = {
    "rank": ("Rank", 256, 1),
    "batch": ("Batch", 6, 1),
    "held_out_every": ("Steps between measurements", 10, 1),
    "patience": ("Patience", 0, 0),
}
SWITCHES = {"recompute": "Recompute layers", "recorded": "Record steps"}


def lay_finer(kind: str) -> list[Any]:
    """Lay the settings out; they come back in the order that `finer_of` takes them."""
    with gr.Accordion("Finer settings", open=False, elem_id=f"{kind}-finer"):
        with gr.Row():
            choices = [
                gr.Dropdown(
                    rows,
                    value=rows[0][1],
                    label=label,
                    info=help_for(word),
                    elem_id=f"{kind}-{word}",
                )
                for word, (label, rows) in CHOICES.items()
            ]
        numbers = lay_numbers(kind, NUMBERS, {})
        with gr.Row():
            switches = [
                gr.Checkbox(False, label=label, info=help_for(word), elem_id=f"{kind}-{word}")
                for word, label in SWITCHES.items()
            ]
    return [*choices, *numbers, *switches]


def finer_of(*values: Any) -> dict[str, Any]:
    """What the fields of `lay_finer` say, as parameters of a run.

    Raises:
        InputError: a number that is missing.
    """
    named = dict(zip((*CHOICES, *NUMBERS, *SWITCHES), values, strict=True))
    tier = str(named["tier"])
    return {
        **named,
        **numbers_of(NUMBERS, named),
        "tier": int(tier) if tier.isdecimal() else tier,
    }
