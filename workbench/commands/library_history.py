"""`workbench library`: tags, pins, revert and diff."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console

from workbench.commands.shared import Session, command
from workbench.commands.show import lines

__all__ = ["add_to"]

TENSORS = {
    "name": "tensor",
    "state": "",
    "old_norm": "norm, old",
    "new_norm": "norm, new",
    "least": "apart, at least",
    "most": "at most",
    "new_changed": "elements changed",
}
MOST = 20
PINS = {"short": "digest", "created": "since", "reason": "why"}
Ref = Annotated[str, typer.Argument(help="A name, name@3, name@2026-11-22, name@tag or digest.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to `workbench library`."""
    for work in (tag, untag, pin, unpin, pins, revert, diff):
        command(app, work.__name__)(work)


def tag(
    session: Session,
    ref: Ref,
    tag: Annotated[str, typer.Argument(help="What to call it: name@TAG means it from then on.")],
    move: Annotated[bool, typer.Option("--move", help="Even if it means another now.")] = False,
) -> None:
    """Give a revision a tag, so that name@tag means it."""
    entry = session.wb.library.tag(ref, tag, move=move)
    _say(session, entry, f"{entry.name}@{tag} is {entry.name}@{entry.revision} now.", tag=tag)


def untag(
    session: Session,
    name: Annotated[str, typer.Argument(help="A name of 'library list'.")],
    tag: Annotated[str, typer.Argument(help="One of its tags.")],
) -> None:
    """Take a tag away; the revision stays."""
    session.wb.library.untag(name, tag)
    words = f"{name}@{tag} means nothing any more."
    session.answer({"name": name, "untagged": tag}, lambda out: out.print(words))


def pin(
    session: Session,
    ref: Ref,
    reason: Annotated[str, typer.Option("--reason", help="Why, for whoever wonders.")] = "",
) -> None:
    """Keep an entry from 'gc', whatever becomes of its name."""
    entry = session.wb.library.pin(ref, reason)
    _say(session, entry, f"Pinned {entry.name}@{entry.revision} ({entry.digest[:12]}).")


def unpin(session: Session, ref: Ref) -> None:
    """Take a pin away."""
    entry = session.wb.library.unpin(ref)
    _say(session, entry, f"Unpinned {entry.name}@{entry.revision} ({entry.digest[:12]}).")


def pins(session: Session) -> None:
    """List what is pinned."""
    rows = [asdict(row) for row in session.wb.library.pins()]
    drawn = [{**row, "short": row["digest"][:12]} for row in rows]
    session.answer({"pins": rows}, lambda out: out.print(lines(drawn, PINS)))


def revert(session: Session, ref: Ref) -> None:
    """Make an old revision the newest again; a name alone goes back by one."""
    entry = session.wb.library.revert(ref)
    _say(session, entry, f"{entry.name}@{entry.revision} is what it was ({entry.digest[:12]}).")


def diff(
    session: Session,
    old: Ref,
    new: Annotated[str, typer.Argument(help="What to compare with; default: the newest.")] = "",
) -> None:
    """Show what differs between two entries, tensor by tensor, without reading payloads."""
    found = session.wb.library.diff(old, new or old.partition("@")[0])

    def draw(out: Console) -> None:
        if found.equal:
            out.print("They are the same, bit for bit.")
            return
        rows = [asdict(row) for row in found.tensors]
        rows.sort(key=lambda row: -(row["most"] or 0.0))
        if rows:
            out.print(lines(rows[:MOST], TENSORS))
        more = f" The {MOST} that differ most are shown." if len(rows) > MOST else ""
        out.print(f"{len(rows)} tensors differ, {found.same} are the same.{more}")
        if not found.same_base:
            out.print("They belong to different bases, so their norms cannot be compared.")
        for name, state in found.files.items():
            out.print(f"file {name}: {state}")
        for key, (was, is_) in found.info.items():
            out.print(f"{key}: {str(was)[:60]} -> {str(is_)[:60]}")

    session.answer(asdict(found), draw)


def _say(session: Session, entry: Any, words: str, **more: Any) -> None:
    kept = {"name": entry.name, "revision": entry.revision, "digest": entry.digest, **more}
    session.answer(kept, lambda out: out.print(words))
