"""Surface: every command explains itself, and help costs nothing."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from workbench.cli import ORDER, app

# Not pydantic: Typer itself reads options with it.
HEAVY = ("torch", "transformers", "vllm", "gradio", "numpy", "httpx", "huggingface_hub")
DOCUMENTED = (
    *("doctor", "app", "models", "contrast", "extract", "generate", "verify", "train", "compare"),
    *("gradients", "search", "bisect", "library", "runs", "serve", "bench", "demo"),
)


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its words."""
    for name, inner in getattr(command, "commands", {}).items():
        if hasattr(inner, "commands"):
            yield from leaves(inner, (*path, name))
        else:
            yield (*path, name), inner


COMMANDS = dict(leaves(typer.main.get_command(app)))


def test_the_commands_are_those_of_the_agreement() -> None:
    assert {path[0] for path in COMMANDS} == set(DOCUMENTED) == set(ORDER)


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_and_option_has_help(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    assert command.help and command.help.partition("\n\n")[0].endswith(".")
    for parameter in command.params:
        assert getattr(parameter, "help", ""), f"{' '.join(path)} {parameter.name}"
    names = {parameter.name for parameter in command.params}
    assert {"home", "model", "engine", "json"} <= names


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_answers(path: tuple[str, ...], workbench: Any) -> None:
    found = workbench(*path, "--help")
    assert found.code == 0
    assert f"workbench {' '.join(path)}" in found.out


def run_fresh(arguments: list[str], home: Path) -> tuple[float, str]:
    """The CPU seconds that a command takes in a new process, and what heavy things it imported."""
    code = (
        "import sys\n"
        "from workbench.cli import main\n"
        f"main({arguments!r})\n"
        f"print(*[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["library", "--help"]])
def test_help_is_quick_and_light(arguments: list[str], home: Path) -> None:
    # 0.5 s on an idle machine is the promise. CPU time, unlike the clock's, stands still while
    # others work, but not their share of the caches.
    found = [run_fresh(arguments, home) for _ in range(3)]
    assert found[0][1].split() == []
    assert min(seconds for seconds, _ in found) < 0.8


def test_grammar_in_a_help_text_is_shown_as_it_is(workbench: Any) -> None:
    found = " ".join(workbench("generate", "--help").out.replace("│", "").split())
    assert "name[@revision]=dose[:block|:first-last][/phase]" in found
    assert "name[@revision]=weight" in found


def test_doctor_imports_no_torch(home: Path) -> None:
    _, imported = run_fresh(["doctor"], home)
    assert not {"torch", "transformers", "vllm", "gradio"} & set(imported.split())


def test_no_command_shows_the_help(workbench: Any) -> None:
    found = workbench()
    assert found.code == 2
    assert "Commands" in found.out
