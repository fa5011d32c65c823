"""The fields on the left of the tab, and the steering terms that they make."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ui.choices import vector_choice
from ui.forms import STILL, typed
from ui.help import help_for
from vectors.errors import GrammarError
from vectors.grammar import format_steer, parse_steer

__all__ = ["Settings", "lay_fields", "steer_terms"]


@dataclass(frozen=True)
class Settings:
    """What the fields hold, in the order of `lay_fields`."""

    vector: str | None
    dose: float
    block: str
    phase: str
    further: str
    tasks: str
    as_: str
    rank: float | None
    system: str
    temperature: float
    seed: float | None
    max_tokens: float
    colour: bool
    both: bool

    @property
    def weights(self) -> dict[str, Any]:
        """Which trained weights, and how they reach the model."""
        if not typed(self.tasks):
            return {}
        lora = {"as_": "lora", "rank": None if self.rank is None else int(self.rank)}
        return {"tasks": typed(self.tasks), **(lora if self.as_ == "lora" else {})}

    @property
    def project(self) -> str:
        """The vector on which tokens are projected; nothing where they are not coloured."""
        return self.vector or "" if self.colour else ""

    @property
    def steer(self) -> str:
        """The steering terms of these settings."""
        return steer_terms(self.vector, self.dose, self.block, self.phase, self.further)


def steer_terms(vector: str | None, dose: float, block: str, phase: str, further: str) -> str:
    """The fields as one text of the grammar; a dose of 0 steers nothing and is left out.

    Raises:
        GrammarError: a block or a further term that does not parse.
    """
    terms = [typed(further)] if typed(further) else []
    if vector and dose:
        when = "" if phase == "all" else f"/{phase}"
        terms.insert(0, f"{vector}={float(dose)!r}{_where(block)}{when}")
    return format_steer(parse_steer(",".join(terms))) if terms else ""


def _where(block: str) -> str:
    words = re.sub(r"\s", "", typed(block)).lower()
    if words in ("", "best"):
        return ""
    if re.fullmatch(r"\d{1,5}(-\d{1,5})?", words) is None:
        raise GrammarError(
            "The block must be 'best', a number such as 12, or a range such as 10-14, "
            f"not {block[:40]!r}."
        )
    return f":{words}"


def lay_fields() -> list[Any]:
    """Lay the fields out; they come back in the order of `Settings`."""
    vector = vector_choice("steer-vector")
    dose = gr.Slider(
        -0.6,
        0.6,
        value=0.2,
        step=0.01,
        label="Dose",
        info=help_for("dose"),
        elem_id="steer-dose",
        buttons=[],
    )
    both = gr.Checkbox(value=True, label="Also reply without steering", elem_id="steer-both")
    colour = gr.Checkbox(
        value=False,
        label="Colour tokens by the vector",
        info=help_for("colour"),
        elem_id="steer-colour",
    )
    with gr.Accordion("Where and when", open=False, elem_id="steer-where"):
        where = _where_and_when()
    with gr.Accordion("Writing", open=False, elem_id="steer-writing"):
        writing = _writing()
    return [vector, dose, *where, *writing, colour, both]


def _where_and_when() -> list[Any]:
    return [
        gr.Textbox("best", label="Block", info=help_for("block"), elem_id="steer-block"),
        gr.Radio(
            ["all", "prompt", "decode"],
            value="all",
            label="Phase",
            info=help_for("phase"),
            elem_id="steer-phase",
        ),
        gr.Textbox(
            label="Further vectors",
            info=help_for("further terms"),
            max_length=2000,
            elem_id="steer-further",
        ),
        gr.Textbox(
            label="With trained weights",
            info=help_for("with"),
            max_length=2000,
            elem_id="steer-with",
        ),
        *_way(),
    ]


def _way() -> list[Any]:
    """How trained weights reach the model; the rank is asked for where it counts."""
    way = gr.Radio(
        [("Swap the weights", "swap"), ("Per-request LoRA", "lora")],
        value="swap",
        label="Use them by",
        info=help_for("with as"),
        elem_id="steer-as",
    )
    rank = gr.Number(
        16,
        precision=0,
        minimum=1,
        label="LoRA rank",
        info=help_for("lora rank"),
        visible=False,
        elem_id="steer-rank",
    )
    way.change(lambda chosen: gr.update(visible=chosen == "lora"), way, rank, **STILL)
    return [way, rank]


def _writing() -> list[Any]:
    return [
        gr.Textbox(
            label="System prompt", info=help_for("system prompt"), lines=2, elem_id="steer-system"
        ),
        gr.Slider(
            0,
            2,
            value=0.7,
            step=0.05,
            label="Temperature",
            info=help_for("temperature"),
            elem_id="steer-temperature",
            buttons=[],
        ),
        gr.Number(0, precision=0, label="Seed", info=help_for("seed"), elem_id="steer-seed"),
        gr.Slider(
            1,
            1024,
            value=128,
            step=1,
            label="Most tokens",
            info=help_for("max tokens"),
            elem_id="steer-tokens",
            buttons=[],
        ),
    ]
