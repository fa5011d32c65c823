"""Runs of all kinds: how far each is, what it printed, and a button to cancel it."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ui.forms import STILL, notice, say, told
from ui.markup import log_box, note, progress, seconds, when
from ui.session import Session
from ui.tabs.library.found import lay_found, show_found
from ui.tabs.library.shelf import named

__all__ = ["all_runs"]

PACE = 3
RUNS = ["run", "kind", "state", "asked for", "took", "words"]
MOST_RUNS = 100


def all_runs(session: Session, tab: gr.Tab) -> None:
    """Lay the part out and wire it."""
    runs = session.wb.runs
    with gr.Accordion("Runs", open=True, elem_id="library-runs"):
        box = notice("runs-notice")
        table = gr.Dataframe(
            headers=RUNS,
            datatype="str",
            interactive=False,
            max_height=260,
            label="Runs of all kinds, the newest first; click one to see it",
            elem_id="runs-table",
        )
        with gr.Row():
            chosen = gr.Dropdown([], label="Run", elem_id="runs-chosen")
            cancel = gr.Button("Cancel run", variant="stop", scale=0, min_width=160,
                               elem_id="runs-cancel")  # fmt: skip
        bar = gr.HTML(elem_id="runs-progress")
        found = lay_found("runs")
        lines = gr.HTML(elem_id="runs-log")
        seen = gr.State("")
    timer = gr.Timer(PACE)

    def fill(run_id: str | None, mark: str = "") -> tuple[Any, ...]:
        views = runs.list()[:MOST_RUNS]
        rows = [
            [
                v.id, v.kind, v.state.state, when(v.record.asked_at), seconds(v.seconds),
                v.state.error or v.state.words,
            ]
            for v in views
        ]  # fmt: skip
        names = [v.id for v in views]
        kept = run_id if run_id in names else (names[0] if names else None)
        # An answer may come late, and must not take back what was chosen meanwhile.
        value: dict[str, Any] = {} if kept == run_id else {"value": kept}
        return (rows, gr.update(choices=names, **value), *described(kept, mark))

    def described(run_id: str | None, mark: str) -> tuple[Any, ...]:
        if not run_id:
            return (
                note("No run yet; Extract, Verify, Train and Compare start them.", "plain"),
                "",
                gr.update(interactive=False),
                "",
                *show_found(None),
            )
        view = runs.get(run_id)
        state = view.state
        look = progress(
            state.state, state.share, state.words, view.seconds, view.seconds_left, state.error
        )
        # Drawn anew only where there is something new, so that nobody's zoom is lost.
        now = f"{view.id}:{state.state}:{len(view.events())}"
        drawn = show_found(view) if now != mark else tuple(gr.skip() for _ in found)
        cancellable = gr.update(interactive=not view.ended)
        return look, log_box(view.log_tail()), cancellable, now, *drawn

    def stopped(run_id: str | None) -> tuple[Any, ...]:
        runs.cancel(named(run_id))
        return (say(note("The run stops at its next safe point.", "plain")),)

    def clicked(event: gr.SelectData) -> Any:
        return str(event.row_value[0]) if event.row_value else gr.skip()

    about = [bar, lines, cancel, seen, *found]
    parts = [table, chosen, *about]
    session.on_show(tab, fill, [chosen], box, parts)
    timer.tick(told(len(parts))(fill), [chosen, seen], [box, *parts], **STILL)
    table.select(clicked, outputs=chosen, **STILL)
    chosen.change(told(len(about))(described), [chosen, seen], [box, *about], **STILL)
    cancel.click(told(0)(stopped), chosen, box, **STILL)
