"""The settings of a training, and the parameters that they make."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ui.choices import need_vector
from ui.forms import as_number, typed
from ui.help import help_for
from ui.tabs.train.finer import finer_of, lay_finer
from ui.tabs.train.numbers import lay_numbers, numbers_of
from vectors.errors import InputError

__all__ = ["lay_settings", "name_of_result", "parameters", "settings_of"]

NUMBERS = {
    "prompts": ("Prompts", 150, 8),
    "passes": ("Passes", 1, 1),
    "tokens": ("Tokens a reply", 48, 4),
    "seed": ("Seed", 0, 0),
}


def name_of_result(kind: str, usual: str) -> gr.Textbox:
    """The field for a task vector's name; `usual` says what it is where nothing is typed."""
    return gr.Textbox(
        label="Name of the result",
        info=help_for("task name"),
        placeholder=usual,
        max_length=100,
        elem_id=f"{kind}-name",
    )


def lay_settings(kind: str, written: str) -> tuple[gr.Accordion, list[Any]]:
    """Lay the settings out; they come back in the order that `settings_of` takes them.

    Args:
        kind: of run; the fields' ids begin with it.
        written: the help's word for the number of prompts.
    """
    with gr.Accordion("Settings", open=False, elem_id=f"{kind}-settings") as room:
        with gr.Row():
            optimizer = gr.Radio(
                [("APOLLO", "apollo"), ("AdamW", "adamw"), ("SGD", "sgd")],
                value="apollo",
                label="Optimizer",
                info=help_for("optimizer"),
                elem_id=f"{kind}-optimizer",
            )
            targets = gr.Radio(
                ["soft", "tokens"],
                value="soft",
                label="Targets",
                info=help_for("targets"),
                elem_id=f"{kind}-targets",
            )
            replay = gr.Slider(
                0,
                0.9,
                value=0.25,
                step=0.05,
                label="Replay",
                info=help_for("replay"),
                elem_id=f"{kind}-replay",
                buttons=[],
            )
            rate = gr.Textbox(
                "1e-4",
                label="Learning rate",
                info=help_for("learning rate"),
                elem_id=f"{kind}-learning-rate",
            )
        numbers = lay_numbers(kind, NUMBERS, {"prompts": written})
        finer = lay_finer(kind)
    return room, [optimizer, targets, replay, rate, *numbers, *finer]


def settings_of(
    optimizer: str, targets: str, replay: float, rate: str, *more: Any
) -> dict[str, Any]:
    """What the fields of `lay_settings` say, as parameters of a run.

    Raises:
        InputError: a number that is missing or none.
    """
    learning_rate = as_number(rate, "learning rate")
    if learning_rate is None:
        raise InputError("Give a learning rate; 1e-4 is a good start.")
    numbers, finer = more[: len(NUMBERS)], more[len(NUMBERS) :]
    return {
        "optimizer": optimizer,
        "targets": targets,
        "replay": float(replay),
        "learning_rate": learning_rate,
        **numbers_of(NUMBERS, dict(zip(NUMBERS, numbers, strict=True))),
        **finer_of(*finer),
    }


def parameters(
    vector: str | None, name: str, dose: str, read_pairs: bool, *settings: Any
) -> dict[str, Any]:
    """What the fields say, as parameters of the run.

    Raises:
        InputError: no vector, or a number that is missing or none.
    """
    chosen, wanted = need_vector(vector), as_number(dose, "dose")
    return {
        "name": typed(name) or f"{chosen}-baked",
        "vector": chosen,
        "read_pairs": bool(read_pairs),
        **settings_of(*settings),
        **({} if wanted is None else {"dose": wanted}),
    }
