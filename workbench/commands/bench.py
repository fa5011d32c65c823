"""`workbench bench`: the measurements of `benchmarks/`, by name."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from vectors.errors import BackendUnavailable, NameNotFound
from workbench.commands.shared import Session, command
from workbench.commands.show import lines

__all__ = ["add_to"]

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def add_to(app: typer.Typer) -> None:
    """Add the command to the root."""
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    command(app, "bench", context_settings=settings)(bench)


def bench(
    session: Session,
    case: Annotated[str, typer.Argument(help="A case; leave it out to list them.")] = "",
    options: Annotated[list[str] | None, typer.Argument(help="Options of the case.")] = None,
) -> None:
    """Run a benchmark, or list them."""
    cases = {file.stem.replace("_", "-"): file for file in sorted(FOLDER.glob("[!_]*.py"))}
    if not cases:
        raise BackendUnavailable(
            f"There are no benchmarks in {FOLDER}; run this from a checkout of the repository."
        )
    if not case:
        rows = [{"case": name, "about": _about(file)} for name, file in cases.items()]
        table = {"case": "case", "about": ""}
        session.answer({"cases": rows}, lambda out: out.print(lines(rows, table)))
        return
    case = case.replace("_", "-")
    if case not in cases:
        raise NameNotFound(f"There is no benchmark {case[:60]!r}; use {', '.join(cases)}.")
    environment = {**os.environ, "WORKBENCH_MODEL": session.model_name}
    if session.home:
        environment["WORKBENCH_HOME"] = session.home
    asked = [*(options or []), *(["--json"] if session.json else [])]
    done = subprocess.run([sys.executable, str(cases[case]), *asked], env=environment, check=False)
    if done.returncode:
        raise typer.Exit(abs(done.returncode))


def _about(file: Path) -> str:
    try:
        return (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").partition("\n")[0]
    except (OSError, SyntaxError, ValueError):
        return ""
