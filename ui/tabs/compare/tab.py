"""The comparison as a run: many prompts, measured, and kept."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ui.choices import TASKS, VECTORS, follow, need_task, need_vector, task_choice, vector_choice
from ui.forms import as_number, typed
from ui.help import guide, help_for
from ui.markup import facts, lead, note, number, seconds
from ui.panel import RunPanel
from ui.reload import remember
from ui.session import Session
from ui.tabs.compare.live import Live

__all__ = ["build"]

PROMPTS = """How was your day?
What should I cook tonight?
My train is late again.
Tell me about the weather in Oslo."""
WHO = ["base", "steered", "trained"]
ROWS = ["prompt", *WHO]


def build(session: Session) -> gr.Tab:
    """Lay the tab out and wire it."""
    with gr.Tab("Compare", id="compare", elem_id="tab-compare") as tab:
        gr.HTML(lead(guide("Compare")))
        with gr.Row():
            vector = vector_choice("compare-vector")
            task = task_choice("compare-task")
            dose = gr.Textbox(
                label="Dose", info=help_for("compare dose"), max_length=20, elem_id="compare-dose"
            )
        writing = _writing()
        prompts = gr.Textbox(
            PROMPTS,
            label="Prompts",
            info=help_for("compare prompts"),
            lines=4,
            max_lines=12,
            elem_id="compare-prompts",
        )
        panel = RunPanel(session, "compare")
        result = _result()
        live = Live(session)

    fields = [vector, task, dose, *writing]
    panel.wire(_parameters, [prompts, *fields], _show, result)
    live.wire(fields)
    follow(session, tab, panel.notice, {vector: VECTORS, task: TASKS})
    remember(session.page, [vector, task], [dose, *writing, prompts, live.prompt])
    return tab


def _writing() -> list[Any]:
    with gr.Accordion("Writing", open=False, elem_id="compare-writing"), gr.Row():
        tokens = gr.Slider(
            1,
            512,
            value=64,
            step=1,
            label="Most tokens",
            info=help_for("max tokens"),
            elem_id="compare-tokens",
            buttons=[],
        )
        temperature = gr.Slider(
            0,
            2,
            value=0,
            step=0.05,
            label="Temperature",
            info=help_for("temperature"),
            elem_id="compare-temperature",
            buttons=[],
        )
        seed = gr.Number(
            0, precision=0, label="Seed", info=help_for("seed"), elem_id="compare-seed"
        )
    return [tokens, temperature, seed]


def _result() -> list[Any]:
    with gr.Column(visible=False, elem_id="compare-result") as result:
        sentence = gr.HTML(elem_id="compare-sentence")
        table = gr.Dataframe(
            headers=ROWS,
            datatype="str",
            interactive=False,
            wrap=True,
            column_widths=["16%", "28%", "28%", "28%"],
            max_height=640,
            label="Replies",
            elem_id="compare-rows",
        )
        margins = gr.Dataframe(
            headers=["", *WHO], datatype="str", interactive=False, elem_id="compare-margins"
        )
        summary = gr.HTML(elem_id="compare-summary")
    return [result, sentence, table, margins, summary]


def _parameters(
    prompts: str,
    vector: str | None,
    task: str | None,
    dose: str,
    tokens: float,
    temperature: float,
    seed: float | None,
) -> dict[str, Any]:
    wanted = as_number(dose, "dose")
    lines = [line.strip() for line in typed(prompts).splitlines() if line.strip()]
    return {
        "vector": need_vector(vector),
        "task": need_task(task),
        "max_tokens": int(tokens),
        "temperature": float(temperature),
        "seed": int(seed or 0),
        **({"prompts": lines} if lines else {}),
        **({} if wanted is None else {"dose": wanted}),
    }


def _show(view: Any) -> tuple[Any, ...]:
    found = view.result()
    if view.state.state != "done" or not found:
        return (gr.update(visible=False), "", [], [], "")
    recovered = found["recovered"]
    share = f"{recovered:.0%}" if isinstance(recovered, int | float) else "an unknown share"
    words = (
        f"'{found['task']}' recovers {share} of what '{found['vector']}' does at dose "
        f"{number(found['dose'])}."
    )
    margin, kl = found["margin"], found["kl"]
    weights = found["weights"]
    return (
        gr.update(visible=True),
        note(words, "plain"),
        [[row[key] for key in ROWS] for row in found["rows"]],
        [
            ["margin (nats)", *(number(margin.get(who)) for who in WHO)],
            ["KL from the base (nats a token)", "0", number(kl["steered"]), number(kl["trained"])],
            ["weights", *(str(weights["trained" if w == "trained" else "base"])[:12] for w in WHO)],
        ],
        facts({"took": seconds(found["seconds"])}),
    )
