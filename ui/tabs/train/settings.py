"""The settings of a training, and the parameters that they make."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ui.choices import need_vector
from ui.forms import as_number, typed
from ui.help import help_for
from vectors.errors import InputError

__all__ = ["lay_settings", "parameters"]


def lay_settings() -> list[Any]:
    """Lay the settings out; they come back in the order that `parameters` takes them."""
    with gr.Accordion("Settings", open=False, elem_id="train-settings"):
        with gr.Row():
            optimizer = gr.Radio(
                [("APOLLO", "apollo"), ("AdamW", "adamw"), ("SGD", "sgd")],
                value="apollo",
                label="Optimizer",
                info=help_for("optimizer"),
                elem_id="train-optimizer",
            )
            targets = gr.Radio(
                ["soft", "tokens"],
                value="soft",
                label="Targets",
                info=help_for("targets"),
                elem_id="train-targets",
            )
            replay = gr.Slider(
                0,
                0.9,
                value=0.25,
                step=0.05,
                label="Replay",
                info=help_for("replay"),
                elem_id="train-replay",
                buttons=[],
            )
            rate = gr.Textbox(
                "1e-4",
                label="Learning rate",
                info=help_for("learning rate"),
                elem_id="train-learning-rate",
            )
        with gr.Row():
            numbers = [
                gr.Number(
                    value,
                    precision=0,
                    minimum=least,
                    label=label,
                    info=help_for(word),
                    elem_id=f"train-{word}",
                )
                for word, label, value, least in (
                    ("prompts", "Prompts", 150, 1),
                    ("passes", "Passes", 1, 1),
                    ("tokens", "Tokens a reply", 48, 1),
                    ("seed", "Seed", 0, 0),
                )
            ]
        read_pairs = gr.Checkbox(
            True,
            label="Learn from the set's own texts, too",
            info=help_for("read pairs"),
            elem_id="train-read-pairs",
        )
    return [optimizer, targets, replay, rate, read_pairs, *numbers]


def parameters(
    vector: str | None,
    name: str,
    dose: str,
    optimizer: str,
    targets: str,
    replay: float,
    rate: str,
    read_pairs: bool,
    *numbers: float | None,
) -> dict[str, Any]:
    """What the fields say, as parameters of the run.

    Raises:
        InputError: no vector, or a number that is missing or none.
    """
    chosen = need_vector(vector)
    learning_rate, wanted = as_number(rate, "learning rate"), as_number(dose, "dose")
    if learning_rate is None:
        raise InputError("Give a learning rate; 1e-4 is a good start.")
    named = dict(zip(("prompts", "passes", "tokens", "seed"), numbers, strict=True))
    missing = next((word for word, value in named.items() if value is None), None)
    if missing:
        raise InputError(f"Give a number for the {missing}.")
    return {
        "name": typed(name) or f"{chosen}-baked",
        "vector": chosen,
        "optimizer": optimizer,
        "targets": targets,
        "replay": float(replay),
        "learning_rate": learning_rate,
        "read_pairs": bool(read_pairs),
        **{word: int(value) for word, value in named.items() if value is not None},
        **({} if wanted is None else {"dose": wanted}),
    }
