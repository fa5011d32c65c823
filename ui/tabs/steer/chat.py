"""The two chats on the right of the tab, and the text that goes into them and comes back."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ui.forms import notice
from ui.help import help_for
from ui.session import Session
from ui.talk import SendStop

__all__ = ["PLACE", "Chat", "Turns", "lay_chat", "shown", "text_of", "turns_of"]

PLACE = "steer"
Turns = list[dict[str, str]]


def text_of(message: Any) -> str:
    """The text of a chat message; the chat box gives it back in blocks."""
    content = message["content"]
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, str):
        content = "".join(block.get("text", "") for block in content if isinstance(block, dict))
    return html.unescape(content)


def shown(turns: Turns) -> list[dict[str, Any]]:
    """Chat messages for the chat box, which would take tags in a reply for markup, and tidy plain text up."""
    return [
        {**turn, "content": {"type": "text", "text": html.escape(turn["content"], quote=False)}}
        for turn in turns
    ]


def turns_of(history: list[Any] | None) -> Turns:
    """What the chat box gives back, as messages."""
    return [{"role": m["role"], "content": text_of(m)} for m in history or []]


@dataclass(frozen=True)
class Chat:
    """The parts on the right of the tab."""

    notice: gr.HTML
    left: gr.Column
    plain: gr.Chatbot
    steered: gr.Chatbot
    plain_receipt: gr.HTML
    steered_receipt: gr.HTML
    prompt: gr.Textbox
    buttons: SendStop
    retry: gr.Button
    clear: gr.Button

    @property
    def pages(self) -> list[Any]:
        """The chats and the receipts under them."""
        return [self.plain, self.steered, self.plain_receipt, self.steered_receipt]


def lay_chat(session: Session) -> Chat:
    """Lay the chats out, and the message under them."""
    with gr.Row():
        with gr.Column(min_width=240, elem_id="steer-left") as left:
            plain = _chatbot("Without steering", "steer-plain", help_for("plain chat"))
            plain_receipt = gr.HTML(elem_id="steer-plain-receipt")
        with gr.Column(min_width=240):
            steered = _chatbot("With steering", "steer-steered", help_for("steered chat"))
            steered_receipt = gr.HTML(elem_id="steer-receipt")
    box = notice("steer-notice")
    prompt = gr.Textbox(
        label="Your message",
        info=help_for("message"),
        placeholder="How was your day?",
        lines=2,
        max_lines=8,
        elem_id="steer-prompt",
    )
    with gr.Row():
        buttons = SendStop.lay(session, PLACE, "Send")
        retry = gr.Button("Retry", elem_id="steer-retry")
        clear = gr.Button("Clear", elem_id="steer-clear")
    return Chat(
        box, left, plain, steered, plain_receipt, steered_receipt, prompt, buttons, retry, clear
    )


def _chatbot(label: str, elem_id: str, empty: str) -> gr.Chatbot:
    return gr.Chatbot(
        label=label,
        elem_id=elem_id,
        height=440,
        placeholder=empty,
        render_markdown=False,
        sanitize_html=True,
        allow_tags=False,
        feedback_options=None,
        buttons=["copy"],
        layout="bubble",
    )
