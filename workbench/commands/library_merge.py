"""`workbench library`: merging task vectors, and what to know before."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

from vectors.errors import InputError, NameNotFound
from workbench.commands.shared import Session, command
from workbench.commands.show import facts, lines

__all__ = ["add_to", "read_option"]

METHODS = {"name": "method", "summary": "what it does"}
OPTIONS = {"name": "option", "default": "default", "values": "values", "description": "meaning"}
PAIRS = {
    "first": "task vector",
    "second": "and",
    "cosine": "cosine",
    "conflict": "sign conflict",
    "overlap": "overlap",
}


def add_to(app: typer.Typer) -> None:
    """Add the commands to `workbench library`."""
    for work in (merge, methods, interference):
        command(app, work.__name__)(work)


def merge(
    session: Session,
    terms: Annotated[str, typer.Argument(help="Task terms, such as a=1,b=-0.5.")],
    name: Annotated[str, typer.Option("--name", help="The name to keep the result under.")],
    method: Annotated[str, typer.Option(help="One of 'library methods'.")] = "ties",
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option of the method, such as density=0.3; repeatable."),
    ] = None,
) -> None:
    """Keep task vectors, merged by a method, as a recipe; any term can be left out again later."""
    session.model()
    kept = session.wb.combine(name, terms, method, dict(read_option(text) for text in option or []))
    words = f"Kept as {kept['name']}@{kept['revision']} ({kept['digest'][:12]}), by {method}."
    session.answer(kept, lambda out: out.print(words))


def methods(
    session: Session,
    method: Annotated[str, typer.Argument(help="One of them; leave it out to list all.")] = "",
) -> None:
    """List the ways to merge, or show one with its options."""
    rows = session.wb.merge_methods()
    if not method:
        session.answer({"methods": rows}, lambda out: out.print(lines(rows, METHODS)))
        return
    found = next((row for row in rows if row["name"] == method), None)
    if found is None:
        known = ", ".join(row["name"] for row in rows)
        raise NameNotFound(f"There is no merge method {method[:60]!r}; use one of {known}.")

    def draw(out: Console) -> None:
        out.print(found["summary"])
        out.print(facts({"paper": found["paper"], "reference code": found["code"]}))
        for words in found["differs"]:
            out.print(f"* {words}")
        table = [
            {"name": key, **field, "values": _values(field)}
            for key, field in found["options"].items()
        ]
        if table:
            out.print(lines(table, OPTIONS))

    session.answer(found, draw)


def interference(
    session: Session,
    tasks: Annotated[str, typer.Argument(help="Task vectors, joined by commas.")],
    layers: Annotated[bool, typer.Option("--layers", help="Each layer, too.")] = False,
) -> None:
    """Show how task vectors get in each other's way, before merging them."""
    session.model()
    found = session.wb.interference(tasks)
    table = [_drawn(pair) for pair in found["whole"]]
    by_layer = [
        {"layer": layer, **_drawn(pair)}
        for layer, pairs in found["layers"].items()
        for pair in pairs
    ]

    def draw(out: Console) -> None:
        out.print(lines(table, PAIRS))
        if layers:
            out.print(lines(by_layer, {"layer": "layer", **PAIRS}))
        out.print(
            "Cosine of the changes; share of the elements that both move in which they move apart; "
            "share of their largest elements that they have in common."
        )

    session.answer(found, draw)


def read_option(text: str) -> tuple[str, Any]:
    """Parse `key=value`; a value that is no JSON is a word.

    Raises:
        InputError: no key or no value.
    """
    key, given, value = text.partition("=")
    if not given or not key.strip():
        raise InputError(f"An option is written key=value, not {text[:60]!r}; try density=0.3.")
    try:
        return key.strip(), json.loads(value)
    except ValueError:
        # A word such as `tensor`, which needs no quotes on a command line.
        return key.strip(), value.strip()


def _values(field: dict[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    bounds = {
        "exclusiveMinimum": "above",
        "minimum": "from",
        "exclusiveMaximum": "below",
        "maximum": "to",
    }
    words = " ".join(f"{word} {field[key]:g}" for key, word in bounds.items() if key in field)
    return words or str(field.get("const", field.get("type", "")))


def _drawn(pair: dict[str, Any]) -> dict[str, str]:
    return {
        "first": pair["first"],
        "second": pair["second"],
        "cosine": f"{pair['cosine']:+.3f}",
        "conflict": f"{pair['conflict']:.0%}",
        "overlap": f"{pair['overlap']:.0%}",
    }
