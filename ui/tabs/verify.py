"""Verify: does the direction do what it should, and nothing else?"""

from __future__ import annotations

from typing import Any

import gradio as gr

from ui.charts import doses as doses_chart
from ui.choices import VECTORS, follow, need_vector, vector_choice
from ui.forms import as_numbers
from ui.help import guide, help_for
from ui.markup import facts, lead, number, seconds, verdict
from ui.panel import RunPanel
from ui.reload import remember
from ui.session import Session
from vectors.errors import InputError

__all__ = ["STANDARD", "build", "measured"]

STANDARD = "-0.2, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4"
TWIN = ["dose", "margin", "low", "high", "change", "change, low", "change, high", "KL", "KL, 95 %"]
KEYS = ["margin", "low", "high", "change", "change_low", "change_high", "kl", "kl_p95"]
SAMPLES = ["dose", "repetition", "text"]


def build(session: Session) -> gr.Tab:
    """Lay the tab out and wire it."""
    with gr.Tab("Verify", id="verify", elem_id="tab-verify") as tab:
        gr.HTML(lead(guide("Verify")))
        with gr.Row():
            vector = vector_choice("verify-vector")
            controls = gr.Number(
                19,
                precision=0,
                minimum=1,
                maximum=1000,
                label="Random directions",
                info=help_for("controls"),
                elem_id="verify-controls",
            )
            doses = gr.Textbox(
                label="Doses",
                info=help_for("doses"),
                placeholder=STANDARD,
                max_length=400,
                elem_id="verify-doses",
            )
        panel = RunPanel(session, "verify")
        box = gr.HTML(visible=False, elem_id="verify-verdict")
        with gr.Column(visible=False, elem_id="verify-result") as result:
            chart = gr.Plot(label="Margin and side effect over the dose", elem_id="verify-chart")
            summary = gr.HTML(elem_id="verify-summary")
            samples = gr.Dataframe(
                headers=SAMPLES,
                datatype="str",
                interactive=False,
                wrap=True,
                column_widths=["10%", "12%", "78%"],
                max_height=420,
                label="What it writes at each dose, and how much of it repeats",
                elem_id="verify-samples",
            )
            with gr.Accordion("The same as a table", open=False, elem_id="verify-twin"):
                table = gr.Dataframe(headers=TWIN, interactive=False, elem_id="verify-doses-table")
                random = gr.Dataframe(
                    headers=["random direction", "change of the margin"],
                    interactive=False,
                    max_height=240,
                    elem_id="verify-random-table",
                )

    outputs = [box, result, chart, summary, samples, table, random]
    panel.wire(_parameters, [vector, controls, doses], _show, outputs)
    follow(session, tab, panel.notice, {vector: VECTORS})
    remember(session.page, [vector], [controls, doses])
    return tab


def _parameters(vector: str | None, controls: float | None, doses: str) -> dict[str, Any]:
    named = need_vector(vector)
    if controls is None:
        raise InputError("Give the number of random directions; 19 is the fewest that can pass.")
    chosen = as_numbers(doses, "dose")
    return {"vector": named, "controls": int(controls), **({"doses": chosen} if chosen else {})}


def measured(view: Any) -> dict[str, Any]:
    """The verdict, or what of it has been measured so far."""
    if view.state.state == "done":
        return view.result()
    events = view.events()
    return {
        "doses": [event for event in events if event.get("kind") == "dose"],
        "random": [event for event in events if event.get("kind") == "random"],
    }


def _show(view: Any) -> tuple[Any, ...]:
    found = measured(view)
    rows = sorted(found.get("doses", []), key=lambda row: row["dose"])
    if not rows:
        return (gr.update(visible=False), gr.update(visible=False), None, "", [], [], [])
    box = gr.update(visible=False)
    if "passed" in found:
        box = gr.update(value=verdict(found), visible=True)
    return (
        box,
        gr.update(visible=True),
        doses_chart(found),
        _summary(found),
        [[f"{row['dose']:+g}", f"{row['repetition']:.0%}", row["sample"]] for row in rows],
        [[f"{row['dose']:+g}", *(number(row[key]) for key in KEYS)] for row in rows],
        [[str(int(row["seed"]) + 1), number(row["change"])] for row in found.get("random", [])],
    )


def _summary(found: dict[str, Any]) -> str:
    if "passed" not in found:
        count = len(found["random"])
        return facts({"random directions measured": count}) if count else ""
    prompt, broken = found.get("prompt") or {}, found.get("break_dose")
    return facts(
        {
            "vector": found["vector"],
            "working dose": number(found["working_dose"]),
            "text breaks at": "no measured dose" if broken is None else f"dose {number(broken)}",
            "margin without steering": f"{number(found['base_margin'])} nats",
            "change by asking in the prompt": f"{number(prompt.get('change'))} nats",
            "the prompt": prompt.get("instruction", ""),
            "change by the opposite dose": f"{number(found['opposite_change'])} nats",
            "chance of a random direction (p)": number(found["p_value"]),
            "held-out pairs": found["pairs"],
            "measured in": seconds(found["seconds"]),
        }
    )
