"""The tab's layout and its events."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ui.choices import VECTORS, default_dose, listed, missing
from ui.forms import QUIET, STILL, say, told
from ui.help import guide
from ui.markup import lead, note
from ui.reload import remember
from ui.session import Session
from ui.tabs.steer.chat import Chat, lay_chat
from ui.tabs.steer.fields import lay_fields
from ui.tabs.steer.reload import survive
from ui.tabs.steer.replies import Replies

__all__ = ["build"]


def build(session: Session) -> gr.Tab:
    """Lay the tab out and wire it."""
    with gr.Tab("Steer", id="steer", elem_id="tab-steer") as tab:
        gr.HTML(lead(guide("Steer")))
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                fields = lay_fields()
            with gr.Column(scale=3, min_width=480):
                chat = lay_chat(session)
        code = _code()
        survive(session, chat)
    replies = Replies(session)
    _wire_chat(replies, fields, chat)
    _wire_warnings(session, replies, fields, chat)
    button, *snippets = code
    button.click(
        told(2)(replies.as_code), [chat.prompt, chat.steered, *fields], [chat.notice, *snippets],
        **QUIET,
    )  # fmt: skip
    _wire_vector(session, tab, fields, chat)
    remember(session.page, [fields[0]], [*fields[1:], chat.prompt])
    return tab


def _wire_vector(session: Session, tab: gr.Tab, fields: list[Any], chat: Chat) -> None:
    vector, dose = fields[:2]

    def refresh(value: str | None) -> tuple[Any, ...]:
        update = listed(session, value, *VECTORS)
        words = say(note(missing(update, VECTORS), "plain"))
        same = update["value"] == value
        return words, update, gr.skip() if same else default_dose(session, update["value"])

    session.on_show(tab, refresh, [vector], chat.notice, [vector, dose])


def _code() -> list[Any]:
    with gr.Accordion("Show as curl and Python", open=False, elem_id="steer-code"):
        button = gr.Button("Write the code for these settings", elem_id="steer-as-code")
        with gr.Row():
            curl = gr.Code(language="shell", label="curl", interactive=False, elem_id="steer-curl")
            python = gr.Code(
                language="python", label="Python", interactive=False, elem_id="steer-python"
            )
    return [button, curl, python]


def _wire_chat(replies: Replies, fields: list[Any], chat: Chat) -> None:
    inputs = [chat.prompt, chat.plain, chat.steered, *fields]
    outputs = [chat.notice, chat.prompt, *chat.pages]
    chat.buttons.wire(replies.send, inputs, outputs, chat.prompt, "steer")
    chat.buttons.also(chat.retry, replies.retry, inputs, outputs)

    def clear(browser: gr.Request) -> tuple[Any, ...]:
        """Forget the chat, and what is being written into it."""
        return [], [], "", "", say(), *chat.buttons.forget(browser)

    gr.on(
        [chat.clear.click, chat.plain.clear, chat.steered.clear],
        clear,
        outputs=[*chat.pages, chat.notice, chat.buttons.send, chat.buttons.stop],
        **STILL,
    )
    both = fields[-1]
    both.change(lambda on: gr.update(visible=on), both, chat.left, **STILL)


def _wire_warnings(session: Session, replies: Replies, fields: list[Any], chat: Chat) -> None:
    vector, dose, block, _phase, further = fields[:5]
    warns: dict[str, Any] = {
        "fn": told(0)(replies.warn), "inputs": fields[:5], "outputs": chat.notice, **QUIET,
    }  # fmt: skip
    for event in (dose.change, block.blur, further.blur):
        event(trigger_mode="always_last", **warns)

    def dose_of(chosen: str | None) -> float:
        return default_dose(session, chosen)

    vector.input(told(1)(dose_of), vector, [chat.notice, dose], **QUIET).then(**warns)
