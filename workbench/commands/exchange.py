"""`workbench library export` and `workbench library import`: other programs' files, out and in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vectors.errors import InputError
from vectors.paths import expanded
from workbench.commands.shared import Session, command
from workbench.commands.show import size, stages

__all__ = ["add_to"]

Format = Annotated[
    str,
    typer.Option(
        "--format",
        help="auto, native, gguf, gguf-shifted, svec, persona, persona-pt, checkpoint, lora or "
        "mergekit; auto is never a guess.",
    ),
]


def add_to(app: typer.Typer) -> None:
    """Add the two commands."""
    command(app, "export")(export)
    command(app, "import")(import_)


def export(
    session: Session,
    ref: Annotated[str, typer.Argument(help="A name, name@revision, or a digest.")],
    path: Annotated[Path, typer.Argument(help="The file or folder to write.")],
    format: Format = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    blocks: Annotated[
        str, typer.Option(help="Of a steering vector: best, all, 15, or 10-20.")
    ] = "",
    rank: Annotated[int | None, typer.Option(help="Of a LoRA; 16 by default.")] = None,
    error: Annotated[
        float | None, typer.Option(help="The most that a LoRA may lose, such as 0.05.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of a LoRA's random start.")] = 0,
) -> None:
    """Write an entry as a file or folder that other programs read.

    A steering vector: native (.safetensors), gguf (.gguf), gguf-shifted, svec (.svec), persona. A
    task vector or recipe: checkpoint (a folder), lora (a folder, with its error).
    """
    with stages(session.err) as say:
        told = session.wb.export(
            ref,
            expanded(path),
            format=format,
            force=force,
            blocks=blocks,
            rank=rank,
            error=error,
            seed=seed,
            report=lambda share, words: say(f"{words}, {share:.0%}"),
        )

    def draw(out: Console) -> None:
        out.print(f"Wrote {ref} to {told['out']} as {told['format']} ({size(told['bytes'])}).")
        if "error" in told:
            what = "the adapter as it came" if told["as_imported"] else f"rank {told['rank']}"
            out.print(f"It is {what} and loses {told['error']:.3g} of the change's norm.")
        if told.get("left_out"):
            out.print(f"Left out {len(told['left_out'])} tensors that a LoRA cannot hold.")

    session.answer(told, draw)


def import_(
    session: Session,
    path: Annotated[Path, typer.Argument(help="The file or folder to read.")],
    name: Annotated[str, typer.Option("--name", help="The name to keep it under.")],
    format: Format = "auto",
    contrast: Annotated[
        str, typer.Option(help="Measure a vector's doses with this contrast set.")
    ] = "",
    like: Annotated[str, typer.Option(help="Take a vector's doses from this vector.")] = "",
    unit: Annotated[str, typer.Option(help="file: dose 1 adds what the file holds.")] = "",
    block: Annotated[
        int | None, typer.Option(help="The block used when a term names none.", min=0)
    ] = None,
    term: Annotated[
        list[str] | None,
        typer.Option(help="For a recipe: MODEL=NAME, a model of the file and its task vector."),
    ] = None,
    ignore_hint: Annotated[
        bool, typer.Option("--ignore-hint", help="Whatever model the file names, take this one.")
    ] = False,
) -> None:
    """Keep another program's vector, checkpoint, LoRA or mergekit recipe.

    All but native vectors belong to the model in use (--model). A vector without doses needs one of
    --contrast, --like and --unit.
    """
    with stages(session.err) as say:
        told = session.wb.import_(
            expanded(path),
            name,
            format=format,
            contrast=contrast,
            like=like,
            unit=unit,
            block=block,
            terms=_terms(term or []),
            ignore_hint=ignore_hint,
            report=lambda share, words: say(f"{words}, {share:.0%}"),
        )

    def draw(out: Console) -> None:
        for note in told["notes"]:
            out.print(note)
        kept = f"Kept as {told['name']}@{told['revision']} ({told['digest'][:12]})"
        out.print(f"{kept}, a {told['kind']} from {told['format']}.")

    session.answer(told, draw)


def _terms(given: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in given:
        model, equals, name = text.rpartition("=")
        if not equals or not model or not name:
            raise InputError(f"A term is MODEL=NAME, not {text[:80]!r}.")
        found[model] = name
    return found
