"""Train: teach the weights what the direction does."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ui.charts import learning
from ui.help import guide, help_for
from ui.markup import facts, lead, note, number, seconds
from ui.panel import RunPanel
from ui.session import VECTORS, Session, as_number, say, told, typed
from vectors.errors import InputError

__all__ = ["build"]

MARGINS = ["", "base", "steered", "trained"]
STEPS = ["step", "loss", "gradient norm", "learning rate", "tokens a second"]
HELD_OUT = ["step", "held-out loss", "loss on ordinary text"]
MOST_ROWS = 400
MOSTLY = 0.5
"""The share recovered from which a training counts as having worked."""


def build(session: Session) -> gr.Tab:
    """Lay the tab out and wire it."""
    with gr.Tab("Train", id="train", elem_id="tab-train") as tab:
        gr.HTML(lead(guide("Train")))
        with gr.Row():
            vector = gr.Dropdown(
                [],
                label="Steering vector",
                info=f"{help_for('steering vector')} Verified ones come first.",
                elem_id="train-vector",
            )
            name = gr.Textbox(
                label="Name of the result",
                info=help_for("task name"),
                placeholder="the vector's name and -baked",
                max_length=100,
                elem_id="train-name",
            )
            dose = gr.Textbox(
                label="Dose", info=help_for("train dose"), max_length=20, elem_id="train-dose"
            )
        settings = _settings()
        panel_run = gr.Button("Train", variant="primary", elem_id="train-run")
        panel = RunPanel(session, "train")
        now = gr.HTML(elem_id="train-now")
        with gr.Column(visible=False, elem_id="train-result") as result:
            sentence = gr.HTML(elem_id="train-sentence")
            margins = gr.Dataframe(headers=MARGINS, interactive=False, elem_id="train-margins")
            summary = gr.HTML(elem_id="train-summary")
        with gr.Column(visible=False) as live:
            chart = gr.Plot(label="Loss and gradient norm", elem_id="train-chart")
            with gr.Accordion("The same as a table", open=False, elem_id="train-twin"):
                steps = gr.Dataframe(
                    headers=STEPS, interactive=False, max_height=320, elem_id="train-steps"
                )
                held_out = gr.Dataframe(
                    headers=HELD_OUT, interactive=False, max_height=240, elem_id="train-held-out"
                )

    panel.follow([now, result, sentence, margins, summary, live, chart, steps, held_out], _show)
    panel.starts(panel_run, _parameters, [vector, name, dose, *settings])

    def refresh(value: str | None) -> tuple[Any, ...]:
        update = session.dropdown(value, *VECTORS, verified_first=True)
        return (_unverified(session, update["value"]), update)

    fresh: dict[str, Any] = {
        "fn": told(1)(refresh),
        "inputs": vector,
        "outputs": [panel.notice, vector],
        "queue": False,
        "show_progress": "hidden",
        "api_visibility": "private",
    }
    tab.select(**fresh)
    session.page.load(**fresh)
    vector.input(
        told(0)(lambda value: (_unverified(session, value),)),
        vector,
        panel.notice,
        show_progress="hidden",
        api_visibility="private",
    )
    return tab


def _unverified(session: Session, vector: str | None) -> Any:
    if not vector:
        return say()
    found = session.wb.verdict(vector)
    if found is None:
        return say(
            note(f"'{vector}' was never verified; verify it first, or train on what may be noise.")
        )
    if not found["passed"]:
        return say(note(f"'{vector}' did not pass its verification; training bakes that in."))
    return say()


def _settings() -> list[Any]:
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


def _parameters(
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
    if not vector:
        raise InputError("Choose a steering vector first; the Extract tab makes one.")
    learning_rate, wanted = as_number(rate, "learning rate"), as_number(dose, "dose")
    if learning_rate is None:
        raise InputError("Give a learning rate; 1e-4 is a good start.")
    named = dict(zip(("prompts", "passes", "tokens", "seed"), numbers, strict=True))
    missing = next((word for word, value in named.items() if value is None), None)
    if missing:
        raise InputError(f"Give a number for the {missing}.")
    return {
        "name": typed(name) or f"{vector}-baked",
        "vector": vector,
        "optimizer": optimizer,
        "targets": targets,
        "replay": float(replay),
        "learning_rate": learning_rate,
        "read_pairs": bool(read_pairs),
        **{word: int(value) for word, value in named.items() if value is not None},
        **({} if wanted is None else {"dose": wanted}),
    }


def _show(view: Any) -> tuple[Any, ...]:
    events, found = _once(view.events()), view.result()
    steps = [event for event in events if event.get("kind") == "step"]
    held_out = [event for event in events if event.get("kind") == "held_out"]
    done = view.state.state == "done" and bool(found)
    return (
        _now(steps),
        gr.update(visible=done),
        _sentence(found) if done else "",
        _margins(found) if done else [],
        _summary(found) if done else "",
        gr.update(visible=bool(steps or held_out)),
        learning(events),
        [
            [str(row["step"])]
            + [
                number(row.get(k))
                for k in ("loss", "gradient_norm", "learning_rate", "tokens_per_second")
            ]
            for row in steps[-MOST_ROWS:]
        ],
        [
            [str(row["step"]), number(row.get("loss")), number(row.get("general"))]
            for row in held_out
        ],
    )


def _once(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each step's newest measurement: a resumed run takes the steps after its checkpoint again."""
    newest = {(event.get("kind"), event.get("step")): event for event in events}
    return sorted(newest.values(), key=lambda event: event.get("step") or 0)


def _now(steps: list[dict[str, Any]]) -> str:
    if not steps:
        return ""
    last = steps[-1]
    return facts(
        {
            "step": f"{last['step']} of {last['steps']}",
            "loss": f"{number(last['loss'])} nats",
            "gradient norm": number(last.get("gradient_norm")),
            "learning rate": number(last.get("learning_rate")),
            "speed": f"{number(last.get('tokens_per_second'))} tokens a second",
        }
    )


def _share(value: Any) -> str:
    return f"{value:.0%}" if isinstance(value, int | float) else "an unknown share"


def _sentence(found: dict[str, Any]) -> str:
    words = (
        f"'{found['name']}' revision {found['revision']}: the trained weights recover "
        f"{_share(found['recovered'])} of what '{found['vector']}' does at dose "
        f"{number(found['dose'])}."
    )
    recovered = found["recovered"]
    well = isinstance(recovered, int | float) and recovered >= MOSTLY
    more = "Recovered is not clipped: above 100 % they do more than the vector."
    return note([words, more], "good" if well else "warn")


def _margins(found: dict[str, Any]) -> list[list[str]]:
    margin, kl = found["margin"], found["kl"]
    return [
        ["margin (nats)", *(number(margin.get(key)) for key in MARGINS[1:])],
        ["KL from the base (nats a token)", "0", *(number(kl.get(key)) for key in MARGINS[2:])],
    ]


def _summary(found: dict[str, Any]) -> str:
    times = found.get("times") or {}
    return facts(
        {
            "optimizer": found["optimizer"],
            "decisions learnt": found["decisions"],
            "weights changed": _share(found["changed_share"]),
            "digest": found["digest"][:12],
            "took": seconds(found["seconds"]),
            **{
                f"of that, {name}": seconds(value)
                for name, value in times.items()
                if isinstance(value, int | float)
            },
        }
    )
