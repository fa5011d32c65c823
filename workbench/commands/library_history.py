"""`workbench library`: tags, pins, revert, undo, diff and lineage."""

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
BLOCKS = {"block": "block", "cosine": "cosine", "old_norm": "norm, old", "new_norm": "norm, new"}
TERMS = {"name": "task vector", "old": "weight, old", "new": "weight, new"}
PLACES = {
    "key": "entry",
    "kind": "kind",
    "created": "created",
    "origins": "made of",
    "runs": "runs",
}
MOST = 20
PINS = {"short": "digest", "created": "since", "reason": "why"}
Ref = Annotated[str, typer.Argument(help="A name, name@3, name@2026-11-22, name@tag or digest.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to `workbench library`."""
    for work in (tag, untag, pin, unpin, pins, revert, undo, diff, lineage):
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
    found = session.wb.difference(old, new or old.partition("@")[0])

    def draw(out: Console) -> None:
        if found["equal"]:
            out.print("They are the same, bit for bit.")
            return
        rows = sorted(found["tensors"], key=lambda row: -(row["most"] or 0.0))
        for part, columns in ((rows[:MOST], TENSORS), (found["blocks"], BLOCKS)):
            if part:
                out.print(lines(part, columns))
        if found["terms"]:
            out.print(lines(found["terms"], TERMS))
        more = f" The {MOST} that differ most are shown." if len(rows) > MOST else ""
        out.print(f"{len(rows)} tensors differ, {found['same']} are the same.{more}")
        if not found["same_base"]:
            out.print("They belong to different bases, so their norms cannot be compared.")
        for name, state in found["files"].items():
            out.print(f"file {name}: {state}")
        for key, (was, is_) in found["info"].items():
            out.print(f"{key}: {str(was)[:60]} -> {str(is_)[:60]}")

    session.answer(found, draw)


def undo(session: Session) -> None:
    """Take back the last change of a name, tag or pin; again, the one before it."""
    done = session.wb.library.undo()
    detail = f" ({done.detail})" if done.detail else ""
    words = (
        f"Took back: {done.action} {done.name or done.digest[:12]}{detail}, of {done.created[:19]}."
    )
    session.answer({"undone": asdict(done)}, lambda out: out.print(words))


def lineage(session: Session, ref: Ref) -> None:
    """Show what an entry comes from, its revisions, what was made of them, and by which runs."""
    found = session.wb.lineage(ref)
    rows = []
    for place in found["places"]:
        origins = [_origin(k) for k in found["links"] if k["target"] == place["key"]]
        runs = [
            f"{k['how']} {k['source'] if k['how'] == 'made by' else k['target']}"
            for k in found["links"]
            if k["how"] in ("made by", "measured by") and place["key"] in (k["source"], k["target"])
        ]
        made = ", ".join(words for words in origins if words)
        rows.append({**place, "origins": made, "runs": ", ".join(runs)})

    def draw(out: Console) -> None:
        out.print(lines(rows, PLACES))
        if found["left_out"]:
            out.print(f"{found['left_out']} more are not shown.")

    session.answer(found, draw)


def _origin(link: dict[str, Any]) -> str:
    if link["how"] != "made of":
        return ""
    return link["source"] + ("" if link["weight"] is None else f" x {link['weight']:g}")


def _say(session: Session, entry: Any, words: str, **more: Any) -> None:
    kept = {"name": entry.name, "revision": entry.revision, "digest": entry.digest, **more}
    session.answer(kept, lambda out: out.print(words))
