"""What all commands share: the global options, the session behind a command, and how it speaks.

A command is a function whose first argument is a `Session`; `command` gives it the global options.
Results go to stdout; words about the work, and errors, to stderr.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from workbench.commands.show import run_bar, stages
from workbench.models.bundled import BUNDLED

if TYPE_CHECKING:
    from workbench.engines.base import Engine
    from workbench.models.catalog import Model
    from workbench.service import EngineStatus, Workbench

__all__ = [
    "Detach",
    "EngineOption",
    "HomeOption",
    "JsonOption",
    "ModelOption",
    "Session",
    "as_json",
    "command",
    "complain",
]

WIDE = 160
SETTLE = 20.0
PANEL = "Options of every command"

HomeOption = Annotated[
    str | None,
    typer.Option(
        help="Folder of all state; WORKBENCH_HOME, or the platform's data folder.",
        metavar="FOLDER",
        rich_help_panel=PANEL,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        help=f"A name of 'models list', a folder, or owner/name; WORKBENCH_MODEL, or {BUNDLED}.",
        metavar="MODEL",
        rich_help_panel=PANEL,
    ),
]
EngineOption = Annotated[
    str | None,
    typer.Option(
        help="vllm (default), transformers, or the URL of a 'workbench serve'.",
        metavar="ENGINE",
        rich_help_panel=PANEL,
    ),
]
JsonOption = Annotated[
    bool | None,
    typer.Option("--json", help="Print one JSON object, errors included.", rich_help_panel=PANEL),
]
GLOBAL = {
    "home": HomeOption,
    "model": ModelOption,
    "engine": EngineOption,
    "json": JsonOption,
}
Detach = Annotated[
    bool, typer.Option("--detach", help="Start the run and return; follow it with 'runs follow'.")
]


class Session:
    """One command's workbench, options and voice."""

    def __init__(
        self, home: str | None, model: str | None, engine: str | None, json: bool | None
    ) -> None:
        self.home = home
        self.model_name = model or os.environ.get("WORKBENCH_MODEL") or BUNDLED
        self.engine_kind = engine or "vllm"
        self.json = bool(json)
        self.out = _console(sys.stdout)
        self.err = _console(sys.stderr)

    @cached_property
    def wb(self) -> Workbench:
        """The service; made when first needed, since that imports torch."""
        from workbench.service import Workbench  # noqa: PLC0415  # help is light

        return Workbench(self.home, self.model_name, self.engine_kind)

    @property
    def local(self) -> bool:
        """Whether the engine is one of this home, and not one named by its URL."""
        return self.engine_kind in ("vllm", "transformers")

    def close(self) -> None:
        """Stop what the command started."""
        if "wb" in self.__dict__:
            self.wb.close()

    # -- speaking -------------------------------------------------------------------------------

    def answer(self, result: dict[str, Any], show: Callable[[Console], None]) -> None:
        """Print the result: as JSON, or as `show` draws it."""
        if self.json:
            sys.stdout.write(as_json(result) + "\n")
            sys.stdout.flush()
        else:
            show(self.out)

    def note(self, words: str) -> None:
        """Say something about the work, dimly, on stderr; not with --json, which stays quiet."""
        if not self.json:
            self.err.print(words, style="dim")

    def warn(self, words: str) -> None:
        """Say something that the person should not miss, on stderr."""
        if not self.json:
            self.err.print(words, style="yellow")

    # -- waiting --------------------------------------------------------------------------------

    def model(self) -> Model:
        """The model in use, its fetching shown."""
        with stages(self.err) as say:
            return self.wb.model(lambda share, words: say(f"{self.model_name}: {words}"))

    def engine(self) -> Engine:
        """The engine, its start shown."""
        if self.local:
            self.model()

        def watch(status: EngineStatus) -> None:
            say(f"starting vLLM for {status.model}: {status.stage}, {status.seconds:.0f} s")

        with stages(self.err) as say:
            if self.engine_kind == "transformers":
                say(f"loading {self.model_name} with transformers")
            return self.wb.engine(watch)

    def run(self, kind: str, detach: bool, **parameters: Any) -> dict[str, Any] | None:
        """Start a run and return its result; None where it was left to itself.

        Ctrl-C cancels the run.
        """
        given = {name: value for name, value in parameters.items() if value is not None}
        view = self.wb.start(kind, **given)
        if detach:
            self.answer(
                {"run": view.id, "kind": view.kind, "state": view.state.state},
                lambda out: out.print(f"Started {view.id}; 'workbench runs follow {view.id}'."),
            )
            return None
        try:
            return self.follow(view.id)
        except KeyboardInterrupt:
            self._cancel(view.id)
            raise typer.Exit(130) from None

    def follow(self, run_id: str) -> dict[str, Any]:
        """Show a run until it ends and return its result; its errors are raised."""
        with run_bar(self.err) as watch:
            return self.wb.runs.follow(run_id, watch).result()

    def _cancel(self, run_id: str) -> None:
        self.wb.runs.cancel(run_id)
        limit = time.monotonic() + SETTLE
        with stages(self.err) as say:
            say(f"cancelling {run_id}")
            while not (view := self.wb.runs.get(run_id)).ended and time.monotonic() < limit:
                time.sleep(0.1)
        words = f"The run {run_id} " + ("was cancelled." if view.ended else "is being cancelled.")
        complain("Cancelled", words, self.json)


def _console(stream: Any) -> Console:
    """A console that takes text as it is, and does not fold tables where nobody looks."""
    width = None if stream.isatty() else WIDE
    return Console(file=stream, markup=False, highlight=False, emoji=False, width=width)


def complain(kind: str, message: str, json: bool) -> None:
    """Tell an error: a sentence on stderr, or an object on stdout."""
    if json:
        sys.stdout.write(as_json({"error": {"kind": kind, "message": message}}) + "\n")
        sys.stdout.flush()
    else:
        _console(sys.stderr).print(message, style="red", soft_wrap=True)


def as_json(value: Any) -> str:
    """One line of strict JSON; numbers that are not finite become null."""
    return json.dumps(_finite(value), ensure_ascii=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def command(
    app: typer.Typer, name: str | None = None, **settings: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a function to `app` as a command that has the global options too."""

    def add(work: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(work, eval_str=True).parameters.values())[1:]
        keyword = inspect.Parameter.KEYWORD_ONLY
        extra = [
            inspect.Parameter(option, keyword, default=None, annotation=kind)
            for option, kind in GLOBAL.items()
        ]
        context = inspect.Parameter("ctx", keyword, annotation=typer.Context)

        @functools.wraps(work)
        def run(*, ctx: typer.Context, **values: Any) -> None:
            before = ctx.find_root().params
            chosen = {option: values.pop(option) for option in GLOBAL}
            session = Session(
                **{o: before.get(o) if value is None else value for o, value in chosen.items()}
            )
            try:
                work(session, **values)
            finally:
                session.close()

        parameters = [p.replace(kind=keyword) for p in own] + extra + [context]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(name, **settings)(run)
        return work

    return add
