"""README's code runs as it stands; on the tiny model, so that it takes minutes."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from vectors.steering.controls import random_direction
from vectors.types import SteeringVector
from workbench.commands import serve

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.engine
@pytest.mark.timeout(1500)
def test_the_loop_in_ten_lines(tiny_workbench, monkeypatch, capsys):
    tiny_workbench.engine()
    monkeypatch.setenv("WORKBENCH_HOME", str(tiny_workbench.home.root))
    monkeypatch.setenv("WORKBENCH_MODEL", "tiny")
    code, _ = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert "True" in said or "False" in said
    entry = tiny_workbench.library.get("cheerful-baked")
    assert entry.info["vector"] == tiny_workbench.library.get("cheerful").digest


@pytest.fixture
def served(tiny_workbench, monkeypatch):
    """What `workbench serve` prints, for the shell and for Python."""
    tiny_workbench.engine()
    tiny_workbench.library.save_vector("cheerful", random_vector(tiny_workbench.model()))
    said = io.StringIO()
    serve._draw(Console(file=said, width=60), tiny_workbench.access(), {}, True)
    (line,) = re.findall("^export (.*)$", said.getvalue(), re.MULTILINE)
    for name, value in (setting.split("=", 1) for setting in shlex.split(line)):
        monkeypatch.setenv(name, value)


def random_vector(model):
    directions = {1: random_direction(model.width, 7)}
    return SteeringVector(model.base, directions, {1: 1.0}, 1)


@pytest.mark.engine
def test_a_python_client(served, capsys):
    pytest.importorskip("openai", reason="it comes with vLLM")
    _, code = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.engine
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(served):
    (code,) = blocks("sh")
    ran = subprocess.run(["sh", "-c", code], capture_output=True, text=True, check=True)
    reply, end = json.JSONDecoder().raw_decode(ran.stdout)
    assert reply["choices"][0]["message"]["content"]
    receipt = json.loads(ran.stdout[end:])
    # The first token comes of the prompt's last position, which is not steered.
    assert receipt["decode"] == reply["usage"]["completion_tokens"] - 1, receipt


def test_what_readme_points_at_is_there():
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (root / target).exists(), target
