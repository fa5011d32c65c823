"""`workbench runs`: the long work of this home."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from workbench.commands.results import draw_result
from workbench.commands.shared import Session, command
from workbench.commands.show import age, facts, lines, span

if TYPE_CHECKING:
    from workbench.runs.record import RunView

__all__ = ["app"]

app = typer.Typer(help="List runs; show, follow, cancel, resume, keep or delete one.")
ROWS = {"run": "run", "state": "state", "done": "share", "asked": "asked", "words": ""}
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run of 'runs list'.")]


@command(app, "list")
def list_runs(session: Session) -> None:
    """List all runs, the newest first."""
    rows = [_row(view) for view in session.wb.runs.list()]
    drawn = [{**r, "done": f"{r['share']:.0%}", "asked": age(r["asked_at"])} for r in rows]
    shown = lines(drawn, ROWS) if rows else "There are no runs yet."
    session.answer({"runs": rows}, lambda out: out.print(shown))


@command(app, "show")
def show(session: Session, run: Run) -> None:
    """Show a run: what was asked, how far it is, what came out, what it printed last."""
    view = session.wb.runs.get(run)
    row, log = _row(view), view.log_tail(12)

    def draw(out: Console) -> None:
        took = span(view.seconds)
        out.print(facts({**view.record.parameters, "state": view.state.state, "time": took}))
        out.print(view.state.error or view.state.words)
        if result := view.result():
            draw_result(out, view.kind, result)
        elif log:
            out.print(log, style="dim")

    details: dict[str, Any] = {"parameters": view.record.parameters, "result": view.result()}
    session.answer({**row, **details, "events": view.events(), "log": log}, draw)


@command(app, "follow")
def follow(session: Session, run: Run) -> None:
    """Follow a run to its end; Ctrl-C stops following, and the run goes on."""
    view = session.wb.runs.get(run)
    try:
        result = session.follow(run)
    except KeyboardInterrupt:
        session.note(f"{run} goes on; 'workbench runs cancel {run}' stops it.")
        raise
    session.answer(result, lambda out: draw_result(out, view.kind, result))


@command(app, "cancel")
def cancel(session: Session, run: Run) -> None:
    """Ask a run to stop; it does so at its next safe point."""
    view = session.wb.runs.cancel(run)
    words = f"{run} had ended." if view.ended else f"{run} is being cancelled."
    session.answer(_row(view), lambda out: out.print(words))


@command(app, "resume")
def resume(session: Session, run: Run) -> None:
    """Let a stopped training go on from its last checkpoint, and follow it."""
    view = session.wb.runs.resume(run)
    result = session.follow(view.id)
    session.answer(result, lambda out: draw_result(out, view.kind, result))


@command(app, "keep")
def keep(
    session: Session,
    run: Run,
    name: Annotated[str, typer.Argument(help="What the recipe will be called.")],
) -> None:
    """Keep the best recipe that a search found, after the search."""
    kept = session.wb.keep_best(run, name)
    words = f"Kept {kept['name']}@{kept['revision']}. Try: --with {kept['name']}=1"
    session.answer(kept, lambda out: out.print(words))


@command(app, "delete")
def delete(session: Session, run: Run) -> None:
    """Delete the record of a run that has ended; what it put into the library stays."""
    session.wb.runs.delete(run)
    session.answer({"deleted": run}, lambda out: out.print(f"{run} is deleted."))


def _row(view: RunView) -> dict[str, Any]:
    return {
        "run": view.id,
        "kind": view.kind,
        "state": view.state.state,
        "share": view.state.share,
        "words": view.state.error or view.state.words,
        "asked_at": view.record.asked_at,
        "seconds": view.seconds,
    }
