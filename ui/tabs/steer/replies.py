"""What happens to a message: checked, sent without and with steering, streamed into both chats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from ui.forms import say, typed
from ui.markup import alert, note
from ui.session import Session
from ui.streaming import Part, Stop, together
from ui.tabs.steer.chat import Turns, shown, text_of, turns_of
from ui.tabs.steer.fields import Settings, steer_terms
from ui.talk import failures, proof, waiting
from vectors.errors import InputError

__all__ = ["PLAIN", "STEERED", "Replies", "before_last"]

PLAIN, STEERED = "plain", "steered"
Row = tuple[Any, ...]


class Replies:
    """The handlers of the tab; what they stream fills box, message, both chats, both receipts."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def warn(self, *values: Any) -> Row:
        """Warn of a dose that breaks text, or of a term that does not parse, before it is sent."""
        steer = steer_terms(*values)
        return (say(note(self.session.wb.check_steer(steer) if steer else [])),)

    def retry(
        self, stop: Stop, prompt: str, plain: list[Any], steered: list[Any], *values: Any
    ) -> Iterator[Row]:
        """Answer the last message once more."""
        asked = (text_of(m) for m in reversed(steered or plain or []) if m["role"] == "user")
        histories = (before_last(plain), before_last(steered))
        yield from self.send(stop, next(asked, prompt), *histories, *values)

    def send(
        self, stop: Stop, prompt: str, plain: list[Any], steered: list[Any], *values: Any
    ) -> Iterator[Row]:
        """Stream the replies without and with steering, at the same time."""
        settings, skip = Settings(*values), gr.skip()
        steer = settings.steer
        if typed(settings.tasks):
            yield say(note("Preparing the trained weights.", "plain")), *[skip] * 5
        asked = {"role": "user", "content": typed(prompt)}
        turns = {STEERED: [*turns_of(steered), asked]}
        if settings.both:
            turns[PLAIN] = [*turns_of(plain), asked]
        texts = {STEERED: steer, PLAIN: ""}
        warnings = self.session.wb.check_steer(steer) if steer else []
        requests = {name: self._request(t, settings, texts[name]) for name, t in turns.items()}
        yield say(note(warnings)), "", *_chats(turns, {}), *_under(turns, {}, texts)
        parts: dict[str, Part] = {}
        for parts in together(self.session.wb, requests, stop):
            box = say(note([*warnings, waiting(self.session, parts)]))
            under = _under(turns, parts, texts) if settings.project else [skip, skip]
            yield box, skip, *_chats(turns, parts), *under
        if stop.forget:
            return
        wrong = failures(parts)
        box = say(alert(wrong) if wrong else note(warnings))
        yield box, skip, *_chats(turns, parts), *_under(turns, parts, texts)

    def as_code(self, prompt: str, steered: list[Any], *values: Any) -> tuple[str, str]:
        """The settings as commands that work outside the page."""
        settings, turns = Settings(*values), turns_of(steered)
        if typed(prompt):
            turns.append({"role": "user", "content": typed(prompt)})
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        if not turns:
            raise InputError("Write a message first; it becomes part of the code.")
        code = self.session.wb.as_code(self._request(turns, settings, settings.steer))
        return code["curl"], code["python"]

    def _request(self, turns: Turns, settings: Settings, steer: str) -> Any:
        return self.session.wb.request(
            [dict(turn) for turn in turns],  # type: ignore[misc]  # roles are those of the chat box
            steer=steer,
            **settings.weights,
            system=typed(settings.system),
            max_tokens=int(settings.max_tokens),
            temperature=float(settings.temperature),
            seed=None if settings.seed is None else int(settings.seed),
            project=settings.project,
        )


def before_last(history: list[Any] | None) -> Turns:
    """The chat up to its last question, without it."""
    turns = turns_of(history)
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    return turns[:-1]


def _chats(turns: dict[str, Turns], parts: dict[str, Part]) -> list[Any]:
    """Both chats with what has come so far; one that was not asked stays as it is."""
    out: list[Any] = []
    for name in (PLAIN, STEERED):
        if name not in turns:
            out.append(gr.skip())
            continue
        part = parts.get(name)
        reply = [{"role": "assistant", "content": part.text}] if part and part.text else []
        out.append(shown([*turns[name], *reply]))
    return out


def _under(turns: dict[str, Turns], parts: dict[str, Part], texts: dict[str, str]) -> list[Any]:
    """Both receipts; that of a chat that was not asked stays as it is."""
    return [
        proof(parts.get(name), texts[name]) if name in turns else gr.skip()
        for name in (PLAIN, STEERED)
    ]
