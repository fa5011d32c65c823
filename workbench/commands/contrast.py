"""`workbench contrast`: the sets of pairs that directions are read from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vectors.errors import ContrastSetError
from workbench.commands.shared import Session, command
from workbench.commands.show import facts, lines, table

__all__ = ["app"]

app = typer.Typer(help="List and show contrast sets, check a file, keep a set of your own.")
COLUMNS = {
    "name": "name",
    "about": "about",
    "pairs": "pairs",
    "train": "train",
    "held_out": "held out",
}
Name = Annotated[str, typer.Argument(help="A name of 'contrast list', or a JSONL file.")]
File = Annotated[Path, typer.Argument(help="A JSONL file, one pair a line.")]


@command(app, "list")
def list_sets(session: Session) -> None:
    """List the built-in sets and your own."""
    rows = []
    for name in session.wb.contrast.names():
        try:
            rows.append(_row(session.wb.contrast.get(name)))
        except ContrastSetError as error:
            rows.append({"name": name, "about": str(error)})
    session.answer({"sets": rows}, lambda out: out.print(lines(rows, COLUMNS)))


@command(app, "show")
def show(session: Session, name: Name) -> None:
    """Show the pairs of a set."""
    found = session.wb.contrast.get(name)
    sides = ("positive_instruction", "negative_instruction")
    columns = sides if found.by_instruction else ("positive", "negative")
    rows = [(p.prompt, *(getattr(p, side) for side in columns)) for p in found.pairs]

    def draw(out: Console) -> None:
        out.print(facts(_row(found)))
        out.print(table(["prompt", *columns], rows))

    pairs = [p.model_dump(exclude_defaults=True) | {"held_out": p.held_out} for p in found.pairs]
    session.answer({**_row(found), "rows": pairs}, draw)


@command(app, "check")
def check(session: Session, file: File) -> None:
    """Check a file: it can be used, or which lines are wrong."""
    from workbench.data.contrast import read_contrast  # noqa: PLC0415  # help is light

    row = _row(read_contrast(file))
    words = f"{file} can be used: {row['pairs']} pairs, {row['held_out']} of them held out."
    session.answer({"file": str(file), **row}, lambda out: out.print(words))


@command(app, "add")
def add(
    session: Session,
    name: Annotated[str, typer.Argument(help="The name to keep it under.")],
    file: File,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace your set of this name.")
    ] = False,
) -> None:
    """Check a file and keep it as a set of your own."""
    from workbench.data.contrast import read_contrast  # noqa: PLC0415  # help is light

    kept = session.wb.contrast.save(name, read_contrast(file).to_jsonl(), replace=replace)
    session.answer(_row(kept), lambda out: out.print(f"Kept {len(kept.pairs)} pairs as {name}."))


@command(app, "delete")
def delete(
    session: Session, name: Annotated[str, typer.Argument(help="A set of your own.")]
) -> None:
    """Forget a set of your own; vectors read from it keep their copy."""
    session.wb.contrast.delete(name)
    session.answer({"deleted": name}, lambda out: out.print(f"Deleted the set {name}."))


def _row(found: Any) -> dict[str, Any]:
    return {
        "name": found.name,
        "about": found.about,
        "pairs": len(found.pairs),
        "train": len(found.train),
        "held_out": len(found.held_out),
        "by_instruction": found.by_instruction,
        "digest": found.digest,
    }
