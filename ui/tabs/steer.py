"""Steer: talk to the model with and without the direction, side by side."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ui.help import GUIDE, guide, help_for
from ui.markup import alert, lead, note, receipt
from ui.session import VECTORS, Session, notice, say, told, typed
from ui.streaming import Part, together
from vectors.errors import GrammarError, InputError, WorkbenchError
from vectors.grammar import format_steer, parse_steer

__all__ = ["Settings", "build", "shown", "steer_terms", "text_of"]

PLAIN, STEERED = "plain", "steered"


@dataclass(frozen=True)
class Settings:
    """The fields of the tab, in the order of its inputs."""

    vector: str | None
    dose: float
    block: str
    phase: str
    further: str
    tasks: str
    system: str
    temperature: float
    seed: float | None
    max_tokens: float
    both: bool


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


def text_of(message: Any) -> str:
    """The text of a chat message; the chat box gives it back in blocks."""
    content = message["content"]
    if not isinstance(content, str):
        content = "".join(block.get("text", "") for block in content if isinstance(block, dict))
    return html.unescape(content)


def shown(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """Chat messages for the chat box, which would take tags in a reply for markup."""
    return [{**turn, "content": html.escape(turn["content"], quote=False)} for turn in turns]


def _turns(history: list[Any] | None) -> list[dict[str, str]]:
    return [{"role": m["role"], "content": text_of(m)} for m in history or []]


def build(session: Session) -> gr.Tab:
    """Lay the tab out and wire it."""
    with gr.Tab("Steer", id="steer", elem_id="tab-steer") as tab:
        gr.HTML(lead(guide("Steer")))
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                fields = _fields()
            with gr.Column(scale=3, min_width=480):
                chat = _chat()
        code = _code()
    vector, dose = fields[0], fields[1]
    _Wiring(session, fields, chat, code).all()

    def refresh(value: str | None) -> tuple[Any, ...]:
        update = session.dropdown(value, *VECTORS)
        if update["value"] == value:
            return (update, gr.skip())
        return (update, session.default_dose(update["value"]))

    fresh: dict[str, Any] = {
        "fn": told(2)(refresh),
        "inputs": vector,
        "outputs": [chat.notice, vector, dose],
        "queue": False,
        "show_progress": "hidden",
        "api_visibility": "private",
    }
    tab.select(**fresh)
    session.page.load(**fresh)
    return tab


def _fields() -> list[Any]:
    vector = gr.Dropdown(
        [],
        label="Steering vector",
        info=help_for("steering vector"),
        allow_custom_value=False,
        elem_id="steer-vector",
    )
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
    with gr.Accordion("Where and when", open=False, elem_id="steer-where"):
        block = gr.Textbox("best", label="Block", info=help_for("block"), elem_id="steer-block")
        phase = gr.Radio(
            ["all", "prompt", "decode"],
            value="all",
            label="Phase",
            info=help_for("phase"),
            elem_id="steer-phase",
        )
        further = gr.Textbox(
            label="Further vectors",
            info=help_for("further terms"),
            max_length=2000,
            elem_id="steer-further",
        )
        tasks = gr.Textbox(
            label="With trained weights",
            info=help_for("with"),
            max_length=2000,
            elem_id="steer-with",
        )
    with gr.Accordion("Writing", open=False, elem_id="steer-writing"):
        system = gr.Textbox(
            label="System prompt", info=help_for("system prompt"), lines=2, elem_id="steer-system"
        )
        temperature = gr.Slider(
            0,
            2,
            value=0.7,
            step=0.05,
            label="Temperature",
            info=help_for("temperature"),
            elem_id="steer-temperature",
            buttons=[],
        )
        seed = gr.Number(0, precision=0, label="Seed", info=help_for("seed"), elem_id="steer-seed")
        tokens = gr.Slider(
            1,
            1024,
            value=128,
            step=1,
            label="Most tokens",
            info=help_for("max tokens"),
            elem_id="steer-tokens",
            buttons=[],
        )
    return [
        vector, dose, block, phase, further, tasks, system, temperature, seed, tokens, both,
    ]  # fmt: skip


@dataclass(frozen=True)
class Chat:
    """The right-hand side of the tab."""

    notice: gr.HTML
    left: gr.Column
    plain: gr.Chatbot
    steered: gr.Chatbot
    plain_receipt: gr.HTML
    steered_receipt: gr.HTML
    prompt: gr.Textbox
    send: gr.Button
    stop: gr.Button
    retry: gr.Button
    clear: gr.Button


def _chatbot(label: str, elem_id: str) -> gr.Chatbot:
    return gr.Chatbot(
        label=label,
        elem_id=elem_id,
        height=440,
        render_markdown=False,
        sanitize_html=True,
        allow_tags=False,
        feedback_options=None,
        buttons=["copy"],
        layout="bubble",
    )


def _chat() -> Chat:
    with gr.Row():
        with gr.Column(min_width=240, elem_id="steer-left") as left:
            plain = _chatbot("Without steering", "steer-plain")
            plain_receipt = gr.HTML(elem_id="steer-plain-receipt")
        with gr.Column(min_width=240):
            steered = _chatbot("With steering", "steer-steered")
            steered_receipt = gr.HTML(elem_id="steer-receipt")
    box = notice("steer-notice")
    prompt = gr.Textbox(
        label="Your message",
        info=GUIDE["receipt"],
        placeholder="How was your day?",
        lines=2,
        max_lines=8,
        elem_id="steer-prompt",
    )
    with gr.Row():
        send = gr.Button("Send", variant="primary", elem_id="steer-send")
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id="steer-stop")
        retry = gr.Button("Retry", elem_id="steer-retry")
        clear = gr.Button("Clear", elem_id="steer-clear")
    return Chat(
        box, left, plain, steered, plain_receipt, steered_receipt, prompt, send, stop, retry, clear
    )


def _code() -> list[Any]:
    with gr.Accordion("Show as curl and Python", open=False, elem_id="steer-code"):
        button = gr.Button("Write the code for these settings", elem_id="steer-as-code")
        with gr.Row():
            curl = gr.Code(language="shell", label="curl", interactive=False, elem_id="steer-curl")
            python = gr.Code(
                language="python", label="Python", interactive=False, elem_id="steer-python"
            )
    return [button, curl, python]


class _Wiring:
    """The events of the tab."""

    def __init__(self, session: Session, fields: list[Any], chat: Chat, code: list[Any]) -> None:
        self.session, self.fields, self.chat, self.code = session, fields, chat, code

    def all(self) -> None:
        """Wire everything."""
        chat, fields = self.chat, self.fields
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        outputs = [
            chat.notice, chat.prompt, chat.plain, chat.steered, chat.plain_receipt,
            chat.steered_receipt, chat.send, chat.stop,
        ]  # fmt: skip
        histories = [chat.plain, chat.steered]
        streams: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": 8}
        inputs = [chat.prompt, *histories, *fields]
        chat.send.click(self.send, inputs, outputs, api_name="steer", **streams)
        chat.prompt.submit(self.send, inputs, outputs, api_visibility="private", **streams)
        chat.retry.click(self.retry, inputs, outputs, api_visibility="private", **streams)
        chat.stop.click(self.stop, outputs=chat.stop, queue=False, **quiet)
        gr.on(
            [chat.clear.click, chat.plain.clear, chat.steered.clear],
            self.clear,
            outputs=[*histories, chat.plain_receipt, chat.steered_receipt, chat.notice],
            queue=False,
            **quiet,
        )
        fields[-1].change(
            lambda both: gr.update(visible=both), fields[-1], chat.left, queue=False, **quiet
        )
        vector, dose = fields[0], fields[1]
        warns: dict[str, Any] = {
            "fn": told(0)(self.warn), "inputs": fields[:5], "outputs": chat.notice, **quiet,
        }  # fmt: skip
        for event in (dose.change, fields[2].blur, fields[4].blur):
            event(trigger_mode="always_last", **warns)
        default = told(1)(self.session.default_dose)
        vector.input(default, vector, [chat.notice, dose], **quiet).then(**warns)
        button, *snippets = self.code
        button.click(
            told(2)(self.as_code), [chat.prompt, chat.steered, *fields], [chat.notice, *snippets],
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip

    def warn(self, *values: Any) -> tuple[Any, ...]:
        """Warn of a dose that breaks text, or of a term that does not parse, before it is sent."""
        steer = steer_terms(*values)
        return (say(note(self.session.wb.check_steer(steer) if steer else [])),)

    def request(self, turns: list[Any], s: Settings, steer: str) -> Any:
        """The service's request for these settings."""
        return self.session.wb.request(
            turns,
            steer=steer,
            tasks=typed(s.tasks),
            system=typed(s.system),
            max_tokens=int(s.max_tokens),
            temperature=float(s.temperature),
            seed=None if s.seed is None else int(s.seed),
        )

    def as_code(self, prompt: str, steered: list[Any], *values: Any) -> tuple[str, str]:
        """The settings as commands that work outside the page."""
        s = Settings(*values)
        turns = _turns(steered)
        if typed(prompt):
            turns.append({"role": "user", "content": typed(prompt)})
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        if not turns:
            raise InputError("Write a message first; it becomes part of the code.")
        steer = steer_terms(s.vector, s.dose, s.block, s.phase, s.further)
        code = self.session.wb.as_code(self.request(turns, s, steer))
        return code["curl"], code["python"]

    def stop(self, browser: gr.Request) -> Any:
        """End the replies that are being written for this browser tab."""
        self.session.stop(browser.session_hash)
        return gr.update(interactive=False)

    def clear(self, browser: gr.Request) -> tuple[Any, ...]:
        """Forget the chat."""
        self.session.stop(browser.session_hash)
        return [], [], "", "", say()

    def retry(
        self, browser: gr.Request, prompt: str, plain: list[Any], steered: list[Any], *values: Any
    ) -> Iterator[tuple[Any, ...]]:
        """Answer the last message once more."""
        asked = (text_of(m) for m in reversed(steered or plain or []) if m["role"] == "user")
        yield from self.send(
            browser, next(asked, prompt), _before_last(plain), _before_last(steered), *values
        )

    def send(
        self, browser: gr.Request, prompt: str, plain: list[Any], steered: list[Any], *values: Any
    ) -> Iterator[tuple[Any, ...]]:
        """Stream the replies without and with steering, at the same time."""
        s = Settings(*values)
        skip = gr.skip()
        if typed(s.tasks):
            yield say(note("Preparing the trained weights.", "plain")), *[skip] * 7
        try:
            asked = {"role": "user", "content": typed(prompt)}
            turns = {STEERED: [*_turns(steered), asked]}
            if s.both:
                turns[PLAIN] = [*_turns(plain), asked]
            steer = steer_terms(s.vector, s.dose, s.block, s.phase, s.further)
            texts = {STEERED: steer, PLAIN: ""}
            warnings = self.session.wb.check_steer(steer) if steer else []
            requests = {name: self.request(list(t), s, texts[name]) for name, t in turns.items()}
        except (WorkbenchError, ValueError) as error:
            yield say(alert(str(error))), *[skip] * 5, *_buttons(False)
            return
        stop = self.session.new_stop(browser.session_hash)
        parts: dict[str, Part] = {}
        yield say(note(warnings)), "", *self.shown(turns, parts), "", "", *_buttons(True)
        for parts in together(self.session.wb, requests, stop):
            box = say(note([*warnings, self.waiting(parts)]))
            yield box, skip, *self.shown(turns, parts), skip, skip, *_buttons(True)
        errors = sorted({part.error for part in parts.values() if part.error})
        box = say(alert(" ".join(errors)) if errors else note(warnings))
        receipts = [self.receipt(parts.get(name), texts[name]) for name in (PLAIN, STEERED)]
        yield box, skip, *self.shown(turns, parts), *receipts, *_buttons(False)

    def receipt(self, part: Part | None, asked: str) -> str:
        """What stands under a chat once its reply has ended."""
        if part is None:
            return ""
        return receipt(part.reply, asked) if part.reply else note("Stopped.", "plain")

    def waiting(self, parts: dict[str, Part]) -> str:
        """Why nothing has come yet."""
        if any(part.text or part.done for part in parts.values()):
            return ""
        status = self.session.engine_status()
        if status.state == "ready":
            return ""
        stage = f" ({status.stage})" if status.stage else ""
        return f"The engine is {status.state}{stage}; the replies begin as soon as it is ready."

    def shown(self, turns: dict[str, list[Any]], parts: dict[str, Part]) -> list[Any]:
        """Both chats with what has come so far."""
        out: list[Any] = []
        for name in (PLAIN, STEERED):
            if name not in turns:
                out.append(gr.skip())
                continue
            part = parts.get(name)
            reply = [{"role": "assistant", "content": part.text}] if part and part.text else []
            out.append(shown([*turns[name], *reply]))
        return out


def _before_last(history: list[Any] | None) -> list[Any]:
    """The chat up to its last question, without it."""
    turns = _turns(history)
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    return turns[:-1]


def _buttons(busy: bool) -> tuple[Any, Any]:
    return gr.update(interactive=not busy), gr.update(visible=busy, interactive=True)
