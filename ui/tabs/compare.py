"""Compare: the untrained, the steered and the trained model on the same prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from ui.help import guide, help_for
from ui.markup import alert, facts, lead, note, number, receipt, seconds
from ui.panel import RunPanel
from ui.session import TASKS, VECTORS, Session, as_number, notice, say, told, typed
from ui.streaming import Part, together
from vectors.errors import InputError, WorkbenchError

__all__ = ["build"]

PROMPTS = """How was your day?
What should I cook tonight?
My train is late again.
Tell me about the weather in Oslo."""
WHO = ("base", "steered", "trained")
ROWS = ["prompt", *WHO]


def build(session: Session) -> gr.Tab:
    """Lay the tab out and wire it."""
    with gr.Tab("Compare", id="compare", elem_id="tab-compare") as tab:
        gr.HTML(lead(guide("Compare")))
        with gr.Row():
            vector = gr.Dropdown(
                [],
                label="Steering vector",
                info=help_for("steering vector"),
                elem_id="compare-vector",
            )
            task = gr.Dropdown(
                [], label="Trained result", info=help_for("task vector"), elem_id="compare-task"
            )
            dose = gr.Textbox(
                label="Dose", info=help_for("compare dose"), max_length=20, elem_id="compare-dose"
            )
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
        written = [dose, tokens, temperature, seed]
        prompts = gr.Textbox(
            PROMPTS,
            label="Prompts",
            info=help_for("compare prompts"),
            lines=4,
            max_lines=12,
            elem_id="compare-prompts",
        )
        run = gr.Button("Compare", variant="primary", elem_id="compare-run")
        panel = RunPanel(session, "compare")
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
        live = _live()

    panel.follow([result, sentence, table, margins, summary], _show)
    panel.starts(run, _parameters, [vector, task, prompts, *written])
    _wire_live(session, live, [vector, task, *written])

    def refresh(one: str | None, other: str | None) -> tuple[Any, Any]:
        return session.dropdown(one, *VECTORS), session.dropdown(other, *TASKS)

    fresh: dict[str, Any] = {
        "fn": told(2)(refresh),
        "inputs": [vector, task],
        "outputs": [panel.notice, vector, task],
        "queue": False,
        "show_progress": "hidden",
        "api_visibility": "private",
    }
    tab.select(**fresh)
    session.page.load(**fresh)
    return tab


def _parameters(
    vector: str | None,
    task: str | None,
    prompts: str,
    dose: str,
    tokens: float,
    temperature: float,
    seed: float | None,
) -> dict[str, Any]:
    _both(vector, task)
    wanted = as_number(dose, "dose")
    lines = [line.strip() for line in typed(prompts).splitlines() if line.strip()]
    return {
        "vector": vector,
        "task": task,
        "max_tokens": int(tokens),
        "temperature": float(temperature),
        "seed": int(seed or 0),
        **({"prompts": lines} if lines else {}),
        **({} if wanted is None else {"dose": wanted}),
    }


def _both(vector: str | None, task: str | None) -> None:
    if not vector:
        raise InputError("Choose a steering vector first; the Extract tab makes one.")
    if not task:
        raise InputError("Choose a trained result first; the Train tab makes one.")


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


# -- live ---------------------------------------------------------------------------------------


def _live() -> dict[str, Any]:
    with gr.Accordion("Try one prompt now", open=True, elem_id="compare-live"):
        box = notice("compare-live-notice")
        prompt = gr.Textbox(
            label="Your message",
            info="Base and steered answer together; trained follows when its weights are loaded.",
            placeholder="How was your day?",
            elem_id="compare-live-prompt",
        )
        with gr.Row():
            send = gr.Button("Ask all three", variant="primary", elem_id="compare-live-send")
            stop = gr.Button("Stop", variant="stop", visible=False, elem_id="compare-live-stop")
        with gr.Row(equal_height=True):
            replies, receipts = [], []
            for who in WHO:
                with gr.Column(min_width=220):
                    replies.append(
                        gr.Textbox(
                            label=who.capitalize(),
                            lines=6,
                            max_lines=16,
                            interactive=False,
                            elem_id=f"compare-live-{who}",
                        )
                    )
                    receipts.append(gr.HTML(elem_id=f"compare-live-{who}-receipt"))
    return {
        "box": box, "prompt": prompt, "send": send, "stop": stop,
        "replies": replies, "receipts": receipts,
    }  # fmt: skip


def _wire_live(session: Session, live: dict[str, Any], fields: list[Any]) -> None:
    def ask(
        browser: gr.Request,
        prompt: str,
        vector: str | None,
        task: str | None,
        dose: str,
        tokens: float,
        temperature: float,
        seed: float | None,
    ) -> Iterator[tuple[Any, ...]]:
        """Stream base and steered together, then trained."""
        skip = gr.skip()
        options: dict[str, Any] = {
            "max_tokens": int(tokens), "temperature": float(temperature), "seed": int(seed or 0),
        }  # fmt: skip
        parts: dict[str, Part] = {who: Part() for who in WHO}
        texts: dict[str, str] = dict.fromkeys([*WHO], "")
        key = f"{browser.session_hash}-live"
        try:
            _both(vector, task)
            wanted = as_number(dose, "dose")
            strength = session.default_dose(vector, task) if wanted is None else wanted
            texts["steered"] = f"{vector}={strength!r}" if strength else ""
            yield say(), *[skip] * 6, *_busy(True)
            stop = session.new_stop(key)
            first = {
                who: session.wb.request(typed(prompt), steer=texts[who], **options)
                for who in WHO[:2]
            }
            for got in together(session.wb, first, stop):
                parts.update(got)
                yield say(_waiting(session, got)), *_live_row(parts, texts), *_busy(True)
            if all(_answered(parts[who]) for who in WHO[:2]):
                words = "The trained weights are being loaded; its reply follows."
                yield say(note(words, "plain")), *_live_row(parts, texts), *_busy(True)
                stop = session.new_stop(key)
                then = {"trained": session.wb.request(typed(prompt), tasks=f"{task}=1", **options)}
                for got in together(session.wb, then, stop):
                    parts.update(got)
                    box = say() if parts["trained"].text else say(note(words, "plain"))
                    yield box, *_live_row(parts, texts), *_busy(True)
            errors = sorted({part.error for part in parts.values() if part.error})
            box = say(alert(" ".join(errors))) if errors else say()
            yield box, *_live_row(parts, texts), *_busy(False)
        except (WorkbenchError, ValueError) as error:
            yield say(alert(str(error))), *_live_row(parts, texts), *_busy(False)

    def halt(browser: gr.Request) -> Any:
        session.stop(f"{browser.session_hash}-live")
        return gr.update(interactive=False)

    outputs = [live["box"], *live["replies"], *live["receipts"], live["send"], live["stop"]]
    inputs = [live["prompt"], *fields]
    streams: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": 8}
    live["send"].click(ask, inputs, outputs, api_name="compare_live", **streams)
    live["prompt"].submit(ask, inputs, outputs, api_visibility="private", **streams)
    live["stop"].click(
        halt, outputs=live["stop"], queue=False, show_progress="hidden", api_visibility="private"
    )


def _answered(part: Part) -> bool:
    return part.reply is not None and part.reply.finish != "cancelled"


def _waiting(session: Session, parts: dict[str, Part]) -> str:
    status = session.engine_status()
    if status.state == "ready" or any(part.text or part.done for part in parts.values()):
        return ""
    return note(f"The engine is {status.state}; the replies begin as soon as it is ready.")


def _live_row(parts: dict[str, Part], texts: dict[str, str]) -> list[str]:
    replies = [parts[who].text for who in WHO]
    proofs = [
        receipt(reply, texts[who]) if (reply := parts[who].reply) is not None else "" for who in WHO
    ]
    return [*replies, *proofs]


def _busy(busy: bool) -> tuple[Any, Any]:
    return gr.update(interactive=not busy), gr.update(visible=busy, interactive=True)
