"""Fields for whole numbers, laid out and read by one table of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from ui.help import help_for
from vectors.errors import InputError

__all__ = ["Numbers", "lay_numbers", "numbers_of"]

Numbers = Mapping[str, tuple[str, int, int]]
"""By the run's parameter: the field's label, what it holds at first, and the least that it takes."""


def lay_numbers(kind: str, numbers: Numbers, words: Mapping[str, str]) -> list[gr.Number]:
    """Lay the fields out in a row; `words` are the help's, where they are not the parameter's own."""
    with gr.Row():
        return [
            gr.Number(
                value,
                precision=0,
                minimum=least,
                label=label,
                info=help_for(words.get(name, name)),
                elem_id=f"{kind}-{name}",
            )
            for name, (label, value, least) in numbers.items()
        ]


def numbers_of(numbers: Numbers, values: Mapping[str, Any]) -> dict[str, int]:
    """What the fields hold.

    Raises:
        InputError: one that is empty.
    """
    for name, (label, *_) in numbers.items():
        if values[name] is None:
            raise InputError(f"Give a number for the {label.lower()}.")
    return {name: int(values[name]) for name in numbers}
