"""README's ten lines run as they stand; on the tiny model, so that they take minutes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.engine
@pytest.mark.timeout(1500)
def test_the_loop_in_ten_lines(tiny_workbench, monkeypatch, capsys):
    tiny_workbench.engine()
    monkeypatch.setenv("WORKBENCH_HOME", str(tiny_workbench.home.root))
    monkeypatch.setenv("WORKBENCH_MODEL", "tiny")
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert "True" in said or "False" in said
    entry = tiny_workbench.library.get("cheerful-baked")
    assert entry.info["vector"] == tiny_workbench.library.get("cheerful").digest


def test_what_readme_points_at_is_there():
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (root / target).exists(), target
