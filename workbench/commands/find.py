"""`workbench search` and `bisect`: which coefficients are best, and which change did it; each a run."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from vectors.errors import InputError
from workbench.commands.library_merge import read_option
from workbench.commands.results import draw_result
from workbench.commands.shared import Detach, Session, command

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add the commands to the root."""
    for work in (search, bisect):
        command(app, work.__name__)(work)


def search(
    session: Session,
    recipe: Annotated[str, typer.Argument(help="Task terms, such as a=1,b=-0.5, or a recipe.")],
    behaviour: Annotated[
        list[str],
        typer.Option(
            help="A contrast set to measure, such as cheerful, or formal=-1 to want it to fall; "
            "repeatable."
        ),
    ],
    way: Annotated[
        str,
        typer.Option(
            help="together: one coefficient for all; each: one ingredient after the other; grid: "
            "every combination."
        ),
    ] = "together",
    coefficients: Annotated[
        str, typer.Option(help="What weights are multiplied by, such as 0.5,1,1.5.")
    ] = "",
    own: Annotated[
        list[str] | None,
        typer.Option(
            "--range",
            metavar="NAME=NUMBERS",
            help="Coefficients of one ingredient, such as a=-1,0,1, for each or grid; repeatable.",
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="One of 'library methods'; default: the recipe's own.")
    ] = "linear",
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option of the method, such as density=0.3; repeatable."),
    ] = None,
    budget: Annotated[
        float, typer.Option(help="Nats a token by which the loss on general text may rise.")
    ] = 0.5,
    pairs: Annotated[
        int | None, typer.Option(help="Held-out pairs of each set to read; default: all.")
    ] = None,
    name: Annotated[str, typer.Option(help="Keep the best recipe under this name.")] = "",
    detach: Detach = False,
) -> None:
    """Search the coefficients of a recipe's ingredients by held-out margins and general loss."""
    swept = _numbers(coefficients) if coefficients else None
    parameters = {"recipe": recipe, "behaviours": behaviour, "way": way, "method": method}
    parameters |= {"options": dict(read_option(text) for text in option or [])}
    parameters |= {"coefficients": swept, "ranges": dict(_range(text) for text in own or [])}
    parameters |= {"budget": budget, "pairs": pairs, "name": name}
    _run(session, "search", detach, parameters)


def bisect(
    session: Session,
    entries: Annotated[
        str,
        typer.Argument(
            metavar="GOOD..BAD",
            help="Two revisions of a name, as in a@3..a@9, or two recipes; or one recipe, which is "
            "held against the base.",
        ),
    ],
    behaviour: Annotated[
        str,
        typer.Option(help="A contrast set, whose held-out margin tells; default: general loss."),
    ] = "",
    threshold: Annotated[
        float | None, typer.Option(help="What lies between good and bad; default: half way.")
    ] = None,
    over: Annotated[
        str, typer.Option(help="history, ingredients, or auto: history between two revisions.")
    ] = "auto",
    detach: Detach = False,
) -> None:
    """Find the version or the ingredient that changed a behaviour, in few measurements."""
    parameters = {"entries": entries, "behaviour": behaviour, "threshold": threshold, "over": over}
    _run(session, "bisect", detach, parameters)


def _run(session: Session, kind: str, detach: bool, parameters: dict[str, object]) -> None:
    result = session.run(kind, detach, **parameters)
    if result is not None:

        def draw(out: Console) -> None:
            draw_result(out, kind, result)

        session.answer(result, draw)


def _range(text: str) -> tuple[str, list[float]]:
    name, given, numbers = text.partition("=")
    if not given or not name.strip():
        raise InputError(f"{text[:80]!r} is not a range; write NAME=NUMBERS, as in a=-1,0,1.")
    return name.strip(), _numbers(numbers)


def _numbers(text: str) -> list[float]:
    return [_number(part) for part in text.split(",")]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(
            f"{text.strip()[:40]!r} is not a coefficient; write numbers joined by commas, as in "
            "0.5,1."
        ) from error
