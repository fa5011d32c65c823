"""What a training shows: the loss as it goes, and what came of it at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from ui.charts import learning
from ui.markup import facts, note, number, seconds, size

__all__ = ["MARGINS", "drawn", "lay_result", "share", "show"]

MARGINS = ["", "base", "steered", "trained"]
STEPS = ["step", "loss", "gradient norm", "learning rate", "tokens a second"]
HELD_OUT = ["step", "held-out loss", "loss on ordinary text", "weights changed"]
MOST_ROWS = 400
MOSTLY = 0.5
"""The share recovered from which a training counts as having worked."""


def lay_result(kind: str, columns: list[str]) -> list[Any]:
    """Lay the parts out; they come back in the order that `drawn` fills them."""
    now = gr.HTML(elem_id=f"{kind}-now")
    with gr.Column(visible=False, elem_id=f"{kind}-result") as result:
        sentence = gr.HTML(elem_id=f"{kind}-sentence")
        margins = gr.Dataframe(headers=columns, interactive=False, elem_id=f"{kind}-margins")
        summary = gr.HTML(elem_id=f"{kind}-summary")
    with gr.Column(visible=False) as live:
        chart = gr.Plot(label="Loss and gradient norm", elem_id=f"{kind}-chart")
        with gr.Accordion("The same as a table", open=False, elem_id=f"{kind}-twin"):
            steps = gr.Dataframe(
                headers=STEPS, interactive=False, max_height=320, elem_id=f"{kind}-steps"
            )
            held_out = gr.Dataframe(
                headers=HELD_OUT, interactive=False, max_height=240, elem_id=f"{kind}-held-out"
            )
    return [now, result, sentence, margins, summary, live, chart, steps, held_out]


def show(view: Any) -> tuple[Any, ...]:
    """A training from a vector as it is now, under way or done."""
    return drawn(view, _sentence, _margins)


def drawn(
    view: Any,
    sentence: Callable[[dict[str, Any]], str],
    table: Callable[[dict[str, Any]], list[list[str]]],
) -> tuple[Any, ...]:
    """Any training as it is now; `sentence` and `table` say what came of it."""
    events, found = _once(view.events()), view.result()
    steps = [event for event in events if event.get("kind") == "step"]
    held_out = [event for event in events if event.get("kind") == "held_out"]
    done = view.state.state == "done" and bool(found)
    return (
        _now(steps, [event for event in events if event.get("kind") == "contexts"]),
        gr.update(visible=done),
        sentence(found) if done else "",
        table(found) if done else [],
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
            [
                str(row["step"]),
                number(row.get("loss")),
                number(row.get("general")),
                share(row.get("changed_share")),
            ]
            for row in held_out
        ],
    )


def _once(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each step's newest measurement: a resumed run takes the steps after its checkpoint again."""
    newest = {(event.get("kind"), event.get("step")): event for event in events}
    return sorted(newest.values(), key=lambda event: event.get("step") or 0)


def _now(steps: list[dict[str, Any]], contexts: list[dict[str, Any]]) -> str:
    if not steps:
        return ""
    last = steps[-1]
    memory = last.get("memory")
    return facts(
        {
            "step": f"{last['step']} of {last['steps']}",
            "loss": f"{number(last['loss'])} nats",
            "gradient norm": number(last.get("gradient_norm")),
            "learning rate": number(last.get("learning_rate")),
            "speed": f"{number(last.get('tokens_per_second'))} tokens a second",
            **({"memory": size(memory)} if memory else {}),
            **(_kept_contexts(contexts) if contexts else {}),
        }
    )


def _kept_contexts(contexts: list[dict[str, Any]]) -> dict[str, str]:
    """How often kept contexts were used, and how far the newest to be read again had gone stale."""
    counts = {word: sum(row[word] for row in contexts) for word in ("read", "reused", "refreshed")}
    used = ", ".join(f"{count} {word}" for word, count in counts.items())
    stale = [row["staleness"] for row in contexts if row.get("staleness") is not None]
    words = f"{share(stale[-1], 1)} at the last refresh" if stale else "not measured yet"
    return {"contexts": used, "staleness": f"{words}; due after {contexts[-1]['interval']} steps"}


def share(value: Any, digits: int = 0) -> str:
    """A share in per cent, for people."""
    return f"{value:.{digits}%}" if isinstance(value, int | float) else "an unknown share"


def _sentence(found: dict[str, Any]) -> str:
    words = (
        f"'{found['name']}' revision {found['revision']}: the trained weights recover "
        f"{share(found['recovered'])} of what '{found['vector']}' does at dose "
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
            "weights changed": share(found["changed_share"]),
            "digest": found["digest"][:12],
            **_steps(found),
            "took": seconds(found["seconds"]),
            **{
                f"of that, {name}": seconds(value)
                for name, value in times.items()
                if isinstance(value, int | float)
            },
        }
    )


def _steps(found: dict[str, Any]) -> dict[str, str]:
    """Which step's weights these are, and where those of the last step are."""
    steps = found.get("steps")
    if not steps:
        return {}
    rows = {"weights of step": f"{steps['kept_step']} of {steps['steps']}"}
    return {**rows, "the last step's": found["last"]} if found.get("last") else rows
