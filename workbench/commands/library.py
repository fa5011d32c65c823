"""`workbench library`: what is kept, its history, and arithmetic on it."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vectors.errors import InputError, NameTaken, OutOfSpace
from vectors.paths import expanded
from workbench.commands import library_history, library_merge, library_sign, library_upkeep
from workbench.commands.library_sign import signature_words
from workbench.commands.results import draw_verdict
from workbench.commands.shared import Session, command
from workbench.commands.show import facts, lines, size

__all__ = ["app"]

app = typer.Typer(help="List, show, compose, move and restore what is kept.")
ROWS = {
    "name": "name",
    "kind": "kind",
    "revision": "revision",
    "created": "created",
    "base": "base",
    "size": "size",
    "words": "",
}
LOG = {
    "created": "when",
    "action": "what",
    "name": "name",
    "revision": "revision",
    "digest": "digest",
}
Ref = Annotated[str, typer.Argument(help="A name, name@3, name@2026-11-22, name@tag or digest.")]
Name = Annotated[str, typer.Argument(help="A name of 'library list'.")]
NewName = Annotated[str, typer.Option("--name", help="The name to keep the result under.")]
Terms = Annotated[str, typer.Argument(help="Task terms, such as a=1,b=-0.5.")]


@command(app, "list")
def list_entries(session: Session) -> None:
    """List every name with its newest revision."""
    rows = session.wb.library_rows()
    drawn = [{**row, "size": size(row["bytes"])} for row in rows]

    def draw(out: Console) -> None:
        if not rows:
            out.print("The library is empty; 'workbench extract' makes a first vector.")
            return
        out.print(lines(drawn, ROWS))
        out.print(f"{size(session.wb.library.total_use())} on disk.")

    session.answer({"entries": rows}, draw)


@command(app, "show")
def show(session: Session, ref: Ref) -> None:
    """Show an entry: what it is, where it comes from, and its newest verdict."""
    row = _entry(session, session.wb.library.get(ref))
    verdict = session.wb.verdict(ref)
    row["tags"] = session.wb.library.tags(row["name"])
    row["signatures"] = session.wb.signatures(ref)
    plain = {k: v for k, v in row.items() if k not in ("info", "bytes", "tags", "signatures")}
    info = {k: v for k, v in row["info"].items() if isinstance(v, str | int | float)}

    def draw(out: Console) -> None:
        tags = ", ".join(f"{tag} ({number})" for tag, number in row["tags"].items())
        out.print(facts({**plain, **info, "tags": tags or None, "size": size(row["bytes"])}))
        if verdict is not None:
            out.print()
            draw_verdict(out, verdict)
        for signed in row["signatures"]:
            out.print(signature_words(signed), soft_wrap=True)

    session.answer({**row, "verdict": verdict}, draw)


@command(app, "log")
def log(
    session: Session,
    name: Annotated[str, typer.Argument(help="Only this name's revisions.")] = "",
    limit: Annotated[int, typer.Option(help="The newest so many.", min=1)] = 30,
) -> None:
    """Show what was changed, the newest first."""
    if name:
        rows = [_entry(session, entry) for entry in session.wb.library.history(name)[:limit]]
        rows = [{"action": row["kind"], **row} for row in rows]
    else:
        rows = [asdict(row) for row in session.wb.library.log(limit)]
    drawn = [{**row, "digest": row["digest"][:12]} for row in rows]
    session.answer({"log": rows}, lambda out: out.print(lines(drawn, LOG)))


@command(app, "rename")
def rename(
    session: Session, name: Name, new: Annotated[str, typer.Argument(help="The new name.")]
) -> None:
    """Give a name's whole history another name."""
    session.wb.library.rename(name, new)
    session.answer({"renamed": name, "to": new}, lambda out: out.print(f"{name} is {new} now."))


@command(app, "delete")
def delete(
    session: Session,
    name: Name,
    force: Annotated[bool, typer.Option("--force", help="Even if others are made of it.")] = False,
) -> None:
    """Delete a name; 'restore' brings it back."""
    session.wb.library.delete(name, force=force)
    words = f"Deleted {name}; 'workbench library restore {name}' brings it back."
    session.answer({"deleted": name}, lambda out: out.print(words))


@command(app, "restore")
def restore(session: Session, name: Name) -> None:
    """Bring a deleted name back."""
    session.wb.library.restore(name)
    session.answer({"restored": name}, lambda out: out.print(f"Restored {name}."))


@command(app, "negate")
def negate(
    session: Session,
    task: Annotated[str, typer.Argument(help="A task vector or recipe.")],
    name: NewName,
) -> None:
    """Keep the opposite of a task vector as a recipe."""
    session.model()
    _kept(session, session.wb.negate(task, name))


@command(app, "scale")
def scale(
    session: Session,
    task: Annotated[str, typer.Argument(help="A task vector or recipe.")],
    weight: Annotated[float, typer.Argument(help="What to multiply it by.")],
    name: NewName,
) -> None:
    """Keep a task vector at another weight as a recipe."""
    session.model()
    _kept(session, session.wb.scale(task, weight, name))


@command(app, "combine")
def combine(session: Session, terms: Terms, name: NewName) -> None:
    """Keep a sum of task vectors as a recipe; leaving a term out later removes it exactly."""
    session.model()
    _kept(session, session.wb.combine(name, terms))


@command(app, "materialise")
def materialise(
    session: Session,
    terms: Terms,
    out: Annotated[Path, typer.Option("--out", help="A folder that is not there yet.")],
) -> None:
    """Write the base plus task vectors as a checkpoint folder."""
    from workbench.merging.made import made_on  # noqa: PLC0415  # help is light

    target = expanded(out).resolve()
    if target.exists():
        raise NameTaken(f"{target} exists; name a folder that is not there yet.")
    model = session.model()
    weights = session.wb.weights(terms)
    if weights == "base":
        raise InputError(
            f"'{terms}' adds up to nothing, so the result would be {model.name} itself."
        )
    _copy(session.wb.home.weights / weights, target)
    on = made_on(target)
    words = f"Wrote {model.name} with {terms} to {target}{on and f', merged on {on}'}."
    answer = {"out": str(target), "weights": weights, "merged_on": on}
    session.answer(answer, lambda out: out.print(words))


library_history.add_to(app)
library_merge.add_to(app)
library_sign.add_to(app)
library_upkeep.add_to(app)


def _kept(session: Session, kept: dict[str, Any]) -> None:
    words = f"Kept as {kept['name']}@{kept['revision']} ({kept['digest'][:12]})."
    session.answer(kept, lambda out: out.print(words))


def _entry(session: Session, entry: Any) -> dict[str, Any]:
    return {
        "name": entry.name,
        "kind": entry.kind,
        "revision": entry.revision,
        "digest": entry.digest,
        "base": entry.base,
        "created": entry.created,
        "bytes": session.wb.library.disk_use(entry),
        "info": dict(entry.info),
    }


def _copy(source: Path, target: Path) -> None:
    """Copy a folder, whole or not at all."""
    half = target.with_name(f".{target.name}.half")
    try:
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(source, half)
        half.rename(target)
    except OSError as error:
        shutil.rmtree(half, ignore_errors=True)
        raise OutOfSpace(
            f"{target} could not be written ({error.strerror or error}); free space there."
        ) from error
