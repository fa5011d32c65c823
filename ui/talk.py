"""A message and its replies: Send and Stop, why nothing has come yet, and what each reply proves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ui.forms import QUIET, STILL, fault, say
from ui.heat import heat
from ui.markup import alert, note, receipt
from ui.session import Session
from ui.streaming import Part
from vectors.errors import WorkbenchError

__all__ = ["Ask", "SendStop", "failures", "proof", "waiting"]

Ask = Callable[..., Iterator[tuple[Any, ...]]]
"""A generator of `(stop, *values)`; each thing it yields fills the outputs, a box first."""


@dataclass(frozen=True)
class SendStop:
    """Two buttons: while replies are written, Send is off and Stop is there."""

    session: Session
    place: str
    send: gr.Button
    stop: gr.Button

    @classmethod
    def lay(cls, session: Session, place: str, label: str) -> SendStop:
        """Lay both buttons out, side by side in a row that is open already."""
        return cls(
            session,
            place,
            gr.Button(label, variant="primary", elem_id=f"{place}-send"),
            gr.Button("Stop", variant="stop", visible=False, elem_id=f"{place}-stop"),
        )

    def wire(
        self,
        ask: Ask,
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        prompt: gr.Textbox,
        api_name: str,
    ) -> None:
        """Let Send and the return key in `prompt` run `ask`, and Stop end it."""
        self.also(self.send, ask, inputs, outputs, api_visibility="public", api_name=api_name)
        run = self._run(ask, len(outputs))
        prompt.submit(run, list(inputs), self._with_buttons(outputs), **QUIET, concurrency_limit=8)
        self.stop.click(self._halt, outputs=self.stop, **STILL)

    def also(
        self,
        button: gr.Button,
        ask: Ask,
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        **options: Any,
    ) -> None:
        """Let another button run `ask` in the same place."""
        run = self._run(ask, len(outputs))
        shown = self._with_buttons(outputs)
        button.click(run, list(inputs), shown, **{**QUIET, **options}, concurrency_limit=8)

    def forget(self, browser: gr.Request) -> tuple[Any, Any]:
        """End what is written here, drop it, and give the buttons' state."""
        self.session.stops.end(browser.session_hash, self.place, forget=True)
        return self._buttons(False)

    def _run(self, ask: Ask, count: int) -> Callable[..., Iterator[tuple[Any, ...]]]:
        skip = [gr.skip()] * count

        def run(browser: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
            stop = self.session.stops.new(browser.session_hash, self.place)
            try:
                for row in ask(stop, *values):
                    yield (*row, *self._buttons(True))
            except (WorkbenchError, ValueError) as error:
                yield (say(alert(str(error))), *skip[1:], *self._buttons(False))
            except Exception as error:
                yield (say(fault(error)), *skip[1:], *self._buttons(False))
            else:
                if not stop.forget:
                    yield (*skip, *self._buttons(False))

        return run

    def _halt(self, browser: gr.Request) -> Any:
        self.session.stops.end(browser.session_hash, self.place)
        return gr.update(interactive=False)

    def _with_buttons(self, outputs: Sequence[Any]) -> list[Any]:
        return [*outputs, self.send, self.stop]

    @staticmethod
    def _buttons(busy: bool) -> tuple[Any, Any]:
        return gr.update(interactive=not busy), gr.update(visible=busy, interactive=True)


def waiting(session: Session, parts: Mapping[str, Part]) -> str:
    """Why nothing has come yet, or "" once something has."""
    status = session.engine_status()
    if status.state == "ready" or any(part.text or part.done for part in parts.values()):
        return ""
    stage = f" ({status.stage})" if status.stage else ""
    return f"The engine is {status.state}{stage}; the replies begin as soon as it is ready."


def failures(parts: Mapping[str, Part]) -> str:
    """What went wrong, each thing once."""
    return " ".join(sorted({part.error for part in parts.values() if part.error}))


def proof(part: Part | None, asked: str) -> str:
    """What stands under a reply: its coloured tokens as they come, and once it has ended its receipt, or
    that it was stopped."""
    if part is None:
        return ""
    if part.reply is not None:
        return receipt(part.reply, asked) + heat(part.projections)
    if part.stopped:
        return note("Stopped.", "plain") + heat(part.projections)
    return heat(part.projections, growing=True)
