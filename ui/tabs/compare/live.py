"""One prompt now: base and steered stream together, trained follows when its weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from ui.choices import default_dose, need_task, need_vector
from ui.forms import as_number, notice, say, typed
from ui.help import help_for
from ui.markup import alert, note
from ui.session import Session
from ui.streaming import Part, Stop, together
from ui.talk import SendStop, failures, proof, waiting

__all__ = ["Live"]

PLACE = "compare-live"
FIRST, TRAINED = ("base", "steered"), "trained"
WHO = (*FIRST, TRAINED)
LOADING = "The trained weights are being loaded; their reply follows."
Row = tuple[Any, ...]


class Live:
    """The lower part of the tab."""

    def __init__(self, session: Session) -> None:
        self.session = session
        with gr.Accordion("Try one prompt now", open=True, elem_id=PLACE):
            self.box = notice(f"{PLACE}-notice")
            self.prompt = gr.Textbox(
                label="Your message",
                info=help_for("live prompt"),
                placeholder="How was your day?",
                elem_id=f"{PLACE}-prompt",
            )
            with gr.Row():
                self.buttons = SendStop.lay(session, PLACE, "Ask all three")
            with gr.Row(equal_height=True):
                columns = [_column(who) for who in WHO]
        self.replies, self.receipts = zip(*columns, strict=True)

    def wire(self, fields: list[Any]) -> None:
        """Answer with what the fields say: vector, task, dose, tokens, temperature, seed."""
        outputs = [self.box, *self.replies, *self.receipts]
        self.buttons.wire(
            self._ask, [self.prompt, *fields], outputs, self.prompt, api_name="compare_live"
        )

    def _ask(
        self,
        stop: Stop,
        prompt: str,
        vector: str | None,
        task: str | None,
        dose: str,
        tokens: float,
        temperature: float,
        seed: float | None,
    ) -> Iterator[Row]:
        vector, task = need_vector(vector), need_task(task)
        wanted = as_number(dose, "dose")
        strength = default_dose(self.session, vector, task) if wanted is None else wanted
        terms = dict.fromkeys(WHO, "")
        terms["steered"] = f"{vector}={strength!r}" if strength else ""
        options: dict[str, Any] = {
            "max_tokens": int(tokens), "temperature": float(temperature), "seed": int(seed or 0),
        }  # fmt: skip
        words, wb = typed(prompt), self.session.wb
        first = {who: wb.request(words, steer=terms[who], **options) for who in FIRST}
        parts = {who: Part() for who in WHO}
        yield self._row(parts, terms, "")
        for got in together(wb, first, stop):
            parts.update(got)
            yield self._row(parts, terms, waiting(self.session, got))
        if all(_answered(parts[who]) for who in FIRST):
            yield self._row(parts, terms, LOADING)
            then = {TRAINED: wb.request(words, tasks=f"{task}=1", **options)}
            for got in together(wb, then, stop):
                parts.update(got)
                yield self._row(parts, terms, "" if parts[TRAINED].text else LOADING)
        wrong = failures(parts)
        _, *rest = self._row(parts, terms, "")
        yield say(alert(wrong)) if wrong else say(), *rest

    def _row(self, parts: dict[str, Part], terms: dict[str, str], words: str) -> Row:
        texts = [parts[who].text for who in WHO]
        proofs = [proof(parts[who], terms[who]) for who in WHO]
        return say(note(words, "plain")), *texts, *proofs


def _column(who: str) -> tuple[gr.Textbox, gr.HTML]:
    with gr.Column(min_width=220):
        reply = gr.Textbox(
            label=who.capitalize(),
            lines=6,
            max_lines=16,
            interactive=False,
            elem_id=f"{PLACE}-{who}",
        )
        return reply, gr.HTML(elem_id=f"{PLACE}-{who}-receipt")


def _answered(part: Part) -> bool:
    return part.reply is not None and part.reply.finish != "cancelled"
