"""The command line. Exit codes: 2 bad input, 3 something missing, 1 a fault of ours."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from vectors.errors import WorkbenchError
from workbench.commands import (
    bench,
    contrast,
    doctor,
    exchange,
    find,
    generate,
    library,
    models,
    page,
    runs,
    serve,
    work,
)
from workbench.commands.shared import (
    EngineOption,
    HomeOption,
    JsonOption,
    ModelOption,
    complain,
)

__all__ = ["app", "main"]

DEBUG = "WORKBENCH_DEBUG"

ORDER = (
    *("doctor", "app", "models", "contrast", "extract", "generate", "verify", "train", "compare"),
    *("gradients", "search", "bisect", "library", "runs", "serve", "demo", "bench"),
)


class _InOrder(TyperGroup):
    """The help lists commands in the order in which they are used."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=ORDER.index)


app = typer.Typer(
    name="workbench",
    cls=_InOrder,
    help="Extract, steer, verify, train in, and version behaviours of language models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    home: HomeOption = None,
    model: ModelOption = None,
    engine: EngineOption = None,
    json: JsonOption = None,
) -> None:
    # Without a docstring, the help shows the text above. Commands read these options themselves.
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit(2)


doctor.add_to(app)
page.add_to(app)
app.add_typer(models.app, name="models")
app.add_typer(contrast.app, name="contrast")
generate.add_to(app)
work.add_to(app)
find.add_to(app)
exchange.add_to(library.app)
app.add_typer(library.app, name="library")
app.add_typer(runs.app, name="runs")
serve.add_to(app)
bench.add_to(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; prints no traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        # What the terminal cannot write must not end a command.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        code = _run(given, _wants_json(given))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone. Python would complain when it flushes at the end, so nothing is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _run(given: list[str], json: bool) -> int:
    try:
        code = app(given, prog_name="workbench", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except WorkbenchError as error:
        complain(type(error).__name__, str(error), json)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get(DEBUG) == "1":
            traceback.print_exc()
        if hasattr(error, "format_message"):
            complain("UsageError", _usage(error), json)
            return 2
        complain(
            "Fault",
            f"A fault of ours: {type(error).__name__}: {error}; set {DEBUG}=1 for the traceback.",
            json,
        )
        return 1


def _wants_json(given: list[str]) -> bool:
    """Whether --json was asked for, even where the rest does not parse."""
    return "--json" in given[: given.index("--") if "--" in given else None]


def _usage(error: Any) -> str:
    """What Typer says of a command line that does not parse, as one sentence."""
    words = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "workbench"
    return f"{words}; see '{command} --help'."


if __name__ == "__main__":
    sys.exit(main())
