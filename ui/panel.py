"""A run on the page: its button, progress, time left, cancel, resume, log; found after a reload.

A run is a process of its own with a record on the disk, so that the page only looks: a browser that
leaves stops nothing, and one that comes back attaches to the newest run of the tab's kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from ui.forms import STILL, notice, say, told
from ui.markup import alert, log_box, progress
from ui.session import Session
from vectors.errors import NameNotFound, WorkbenchError

__all__ = ["RunPanel"]

PACE = 1.5
Show = Callable[[Any], tuple[Any, ...]]


class RunPanel:
    """The button that starts a tab's run, and the parts that follow it.

    Args:
        session: what the page shares.
        kind: extract, verify, train or compare.
    """

    def __init__(self, session: Session, kind: str) -> None:
        self.session, self.kind = session, kind
        self.run = gr.Button(kind.capitalize(), variant="primary", elem_id=f"{kind}-run")
        self.notice = notice(f"{kind}-notice")
        self.bar = gr.HTML(visible=False, elem_id=f"{kind}-progress")
        self.cancel = gr.Button("Cancel", visible=False, elem_id=f"{kind}-cancel", size="sm")
        self.resume = gr.Button("Resume", visible=False, elem_id=f"{kind}-resume", size="sm")
        with gr.Accordion(
            "What the run printed", open=False, visible=False, elem_id=f"{kind}-log"
        ) as self.log:
            self.lines = gr.HTML()
        self.run_id = gr.State("")
        self.seen = gr.State("")
        self.timer = gr.Timer(PACE, active=False)
        self._show: Show = lambda view: ()
        self._outputs: list[Any] = []

    def wire(
        self,
        parameters: Callable[..., dict[str, Any]],
        inputs: Sequence[Any],
        show: Show,
        outputs: Sequence[Any],
    ) -> None:
        """Start the run that `parameters` make of `inputs`; fill `outputs` by `show` of the run."""
        self._outputs, self._show = list(outputs), show
        targets = self._targets
        whole = [self.notice, self.run_id, *targets]

        def start(*values: Any) -> tuple[Any, ...]:
            return self._found(self.session.wb.start(self.kind, **parameters(*values)))

        def resume(run_id: str) -> tuple[Any, ...]:
            return self._found(self.session.wb.runs.resume(run_id))

        self.run.click(
            told(1 + len(targets))(start), list(inputs), whole,
            api_name=self.kind, show_progress="hidden", concurrency_limit=4,
        )  # fmt: skip
        self.resume.click(told(1 + len(targets))(resume), self.run_id, whole, **STILL)
        self.cancel.click(told(1)(self._cancel), self.run_id, [self.notice, self.cancel], **STILL)
        self.timer.tick(self._tick, [self.run_id, self.seen], targets, **STILL)
        self.session.page.load(self._attach, outputs=[self.run_id, *targets], **STILL)

    @property
    def _targets(self) -> list[Any]:
        parts = [self.seen, self.bar, self.cancel, self.resume, self.log, self.lines, self.timer]
        return [*parts, *self._outputs]

    def _attach(self) -> tuple[Any, ...]:
        """The newest run of this kind that is under way, else the newest."""
        runs = [view for view in self.session.wb.runs.list() if view.kind == self.kind]
        view = next((v for v in runs if not v.ended), runs[0] if runs else None)
        if view is None:
            return ("", *[gr.skip()] * len(self._targets))
        return self._found(view)

    def _found(self, view: Any) -> tuple[Any, ...]:
        return (view.id, *self._drawn(view, ""))

    def _tick(self, run_id: str, seen: str) -> tuple[Any, ...]:
        try:
            view = self.session.wb.runs.get(run_id)
        except NameNotFound:
            return (*[gr.skip()] * 6, gr.Timer(active=False), *[gr.skip()] * len(self._outputs))
        return self._drawn(view, seen)

    def _drawn(self, view: Any, seen: str) -> tuple[Any, ...]:
        state = view.state
        mark = f"{view.id}:{state.state}:{len(view.events())}"
        bar = progress(
            state.state, state.share, state.words, view.seconds, view.seconds_left, state.error
        )
        lines = view.log_tail() if state.state == "failed" else ""
        rest: tuple[Any, ...] = tuple(gr.skip() for _ in self._outputs)
        if mark != seen:
            try:
                rest = self._show(view)
            except (WorkbenchError, KeyError, TypeError) as error:
                # A record of another version must not keep the rest of the page from working.
                bar += alert(f"This run's result cannot be shown ({error!r}).")
        return (
            mark,
            say(bar),
            gr.update(visible=not view.ended, interactive=True),
            gr.update(visible=view.resumable),
            gr.update(visible=bool(lines)),
            log_box(lines),
            gr.Timer(active=not view.ended),
            *rest,
        )

    def _cancel(self, run_id: str) -> Any:
        self.session.wb.runs.cancel(run_id)
        return gr.update(interactive=False)
