"""`workbench library`: gc, fsck, push and pull."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console

from workbench.commands.shared import Session, command
from workbench.commands.show import lines, size, span, stages

__all__ = ["add_to"]

DAY = 86_400.0
Url = Annotated[str, typer.Argument(help="A folder, s3://bucket/prefix, or another obstore URL.")]
Names = Annotated[list[str] | None, typer.Argument(help="Names; default: all.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to `workbench library`."""
    for work in (gc, fsck, push, pull):
        command(app, work.__name__)(work)


def gc(
    session: Session,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    retention: Annotated[
        float, typer.Option(help="Days that a deleted name can be restored.")
    ] = 90.0,
    grace: Annotated[float, typer.Option(help="Days that anything new stays.")] = 14.0,
) -> None:
    """Remove what no name, pin or running work needs."""
    library = session.wb.library
    found = library.gc(retention=retention * DAY, grace=grace * DAY, dry_run=dry_run)

    def draw(out: Console) -> None:
        done = "Would remove" if dry_run else "Removed"
        out.print(
            f"{done} {len(found.manifests)} entries, {len(found.objects)} objects and "
            f"{found.leftovers} half-written files, {size(found.bytes)} in all."
        )
        if found.names:
            out.print(f"No longer to be restored: {', '.join(found.names)}.")

    session.answer(asdict(found), draw)


def fsck(session: Session) -> None:
    """Check every byte and every reference; damage is moved aside, never deleted."""
    with stages(session.err) as say:
        found = session.wb.library.fsck(lambda share, words: say(f"{words}: {share:.0%}"))

    def draw(out: Console) -> None:
        for fault in found.faults:
            out.print(fault.words, style="red", soft_wrap=True)
        rate = size(int(found.bytes / max(found.seconds, 1e-9)))
        out.print(
            f"Checked {found.objects} objects and {found.manifests} manifests, "
            f"{size(found.bytes)} in {span(found.seconds)} ({rate} a second)."
        )
        if found.leftovers:
            out.print(f"{found.leftovers} half-written files are left; 'gc' removes them.")
        out.print("Nothing is wrong." if found.clean else f"{len(found.faults)} things are wrong.")

    session.answer({"clean": found.clean, **asdict(found)}, draw)
    if not found.clean:
        raise typer.Exit(1)


def push(session: Session, url: Url, names: Names = None) -> None:
    """Bring a copy elsewhere up to this library; only what is missing travels."""
    with stages(session.err) as say:
        done = session.wb.library.push(url, names or (), lambda share, words: say(words))
    _moved(session, done, "Pushed")


def pull(
    session: Session,
    url: Url,
    names: Names = None,
    as_name: Annotated[str, typer.Option("--as", help="Keep the one that is named so.")] = "",
) -> None:
    """Bring this library up to a copy elsewhere; only what is missing travels."""
    with stages(session.err) as say:
        done = session.wb.library.pull(
            url, names or (), as_name=as_name, progress=lambda share, words: say(words)
        )
    _moved(session, done, "Pulled")


def _moved(session: Session, done: Any, what: str) -> None:
    rows = [{"name": name, "state": state} for name, state in done.names.items()]

    def draw(out: Console) -> None:
        changed = [row for row in rows if row["state"] != "same"]
        if changed:
            out.print(lines(changed, {"name": "name", "state": ""}))
        out.print(
            f"{what} {done.objects} objects ({size(done.bytes)}), {done.manifests} entries and "
            f"{done.attestations} attestations; {len(rows) - len(changed)} names were up to date."
        )

    session.answer(asdict(done), draw)
