"""The chats survive a reload of the page, with the receipts under them; see `ui.reload` for where."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

from ui.forms import STILL
from ui.heat import GROWING
from ui.markup import note
from ui.session import Session
from ui.tabs.steer.chat import Chat, Turns, shown, turns_of

__all__ = ["CUT_OFF", "NAMES", "restored", "survive"]

KEY = "workbench-steer"
CHATS = ("plain", "steered")
NAMES = (*CHATS, "plain_receipt", "steered_receipt")
"""The parts of `Chat.pages`, in their order."""
CUT_OFF = "This reply is not complete; Retry writes it again."
RECALL = f"() => sessionStorage.getItem('{KEY}') ?? ''"
# Chats change while the page is built, too; nothing is kept before what was kept is back.
READY = "() => { window.workbenchChatsAreBack = true; }"
REMEMBER = f"""(...values) => {{
  if (!window.workbenchChatsAreBack) return;
  const names = {json.dumps(NAMES)};
  const kept = Object.fromEntries(names.map((name, i) => [name, values[i]]));
  sessionStorage.setItem('{KEY}', JSON.stringify(kept));
}}"""


def survive(session: Session, chat: Chat) -> None:
    """Keep chats and receipts in the browser, and bring them back on loading."""
    text = gr.Textbox(visible=False)
    session.page.load(restored, text, chat.pages, js=RECALL, **STILL).then(
        None, js=READY, api_visibility="private"
    )
    changes = [part.change for part in chat.pages]
    gr.on(changes, None, chat.pages, js=REMEMBER, api_visibility="private")


def restored(text: str | None) -> tuple[Any, ...]:
    """The values of `NAMES`, from what the browser kept."""
    kept = _read(text or "")
    values: dict[str, Any] = {**dict.fromkeys(NAMES, gr.skip()), **kept}
    for name in CHATS:
        turns = _turns(kept.get(name))
        values[name] = shown(turns)
        proof = kept.get(f"{name}_receipt") or ""
        if turns and (not proof or proof.startswith(GROWING)):
            values[f"{name}_receipt"] = note(CUT_OFF, "plain")
    return tuple(values[name] for name in NAMES)


def _read(text: str) -> dict[str, Any]:
    try:
        kept = json.loads(text)
    except ValueError:
        return {}
    if not isinstance(kept, dict):
        return {}
    # A part that was never drawn has no value, and another version of the page other parts.
    return {name: value for name, value in kept.items() if name in NAMES and value is not None}


def _turns(value: Any) -> Turns:
    try:
        return turns_of(value)
    except (AttributeError, KeyError, TypeError):
        return []
