"""`workbench models`: which models can be named, and what they are."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from workbench.commands.shared import Session, command
from workbench.commands.show import facts, lines

__all__ = ["app"]

app = typer.Typer(help="List models, add a local folder, show one.")
COLUMNS = {"name": "name", "ready": "on disk", "note": "size", "folder": "folder"}


@command(app, "list")
def list_models(session: Session) -> None:
    """List the models that can be named."""
    rows = session.wb.models()
    session.answer({"models": rows}, lambda out: out.print(lines(rows, COLUMNS)))


@command(app, "add")
def add(
    session: Session,
    name: Annotated[str, typer.Argument(help="The name to give it.")],
    folder: Annotated[Path, typer.Argument(help="A folder with a Hugging Face checkpoint.")],
) -> None:
    """Give a local checkpoint folder a name; it stays where it is."""
    model = session.wb.add_model(name, str(folder))
    session.answer(_row(model), lambda out: out.print(f"{name} is {model.folder}, {model.size}."))


@command(app, "show")
def show(
    session: Session,
    name: Annotated[str, typer.Argument(help="A model; default --model.")] = "",
) -> None:
    """Show a model, fetching it if it is not on this disk yet."""
    if name:
        session.model_name = name
    model = session.model()
    session.answer(_row(model), lambda out: out.print(facts({**_row(model), "size": model.size})))


def _row(model: object) -> dict[str, object]:
    return {key: str(v) if key == "folder" else v for key, v in asdict(model).items()}  # type: ignore[call-overload]
