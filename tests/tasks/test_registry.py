"""Every row of the registry is whole, and documentation and command line say what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic_core import PydanticUndefined

from vectors.errors import InputError, NameNotFound
from vectors.tasks.page import merging_page
from vectors.tasks.registry import METHODS, Method, method_named
from workbench.cli import main

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "merging.md"
PAPER = re.compile(r".+ \(arXiv:\d{4}\.\d{5}\)")
CODE = re.compile(r"github\.com/[A-Za-z0-9-]+/[A-Za-z0-9_-]+")
ROW = re.compile(r"\| `(?P<option>[a-z_]+)` \| `(?P<default>.+?)` \| .* \| (?P<meaning>.+) \|")

methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def test_the_methods_that_were_promised() -> None:
    promised = {"linear", "ties", "dare", "della", "breadcrumbs", "sce", "tsv-m", "iso-c"}
    assert promised | {"model-stock"} <= set(METHODS)
    assert all(method_named(name).name == name for name in METHODS)
    with pytest.raises(NameNotFound, match=", ".join(METHODS)):
        method_named("nothing")


@methods
def test_a_row_is_whole(method: Method) -> None:
    assert method.summary[0].isupper() and method.summary.endswith(".")
    assert PAPER.fullmatch(method.paper) and CODE.fullmatch(method.code)
    assert method.differs and all(words.endswith((".", ")")) for words in method.differs)
    assert callable(method.merge) and method.least >= 1


@methods
def test_every_option_has_a_default_that_it_accepts_and_a_sentence(method: Method) -> None:
    for name, field in method.parameters.model_fields.items():
        assert field.default is not PydanticUndefined, name
        assert field.description and field.description.endswith("."), name
        assert getattr(method.read({name: field.default}), name) == field.default
    assert method.read({}).model_dump() == {
        name: field.default for name, field in method.parameters.model_fields.items()
    }
    with pytest.raises(InputError, match="no option 'nothing'"):
        method.read({"nothing": 1})


@methods
def test_the_document_says_what_the_row_says(method: Method) -> None:
    """Read back from the file, not from what would be written."""
    section = DOCUMENT.read_text("utf-8").split(f"\n## {method.name}\n")[1].split("\n## ")[0]
    assert f"* Paper: {method.paper}\n* Reference code: {method.code}\n" in section
    assert all(f"* Here: {words}\n" in section + "\n" for words in method.differs)
    rows = {m["option"]: m for m in ROW.finditer(section)}
    assert list(rows) == list(method.parameters.model_fields)
    for name, field in method.parameters.model_fields.items():
        spelt = str(field.default)
        assert rows[name]["default"] in (spelt, spelt.lower())
        assert rows[name]["meaning"] == field.description


def test_the_document_has_no_other_method() -> None:
    page = DOCUMENT.read_text("utf-8")
    listed = re.findall(r"^\| \[`(.+?)`\]", page, re.MULTILINE)
    assert listed == list(METHODS) and page == merging_page()


@methods
def test_the_command_line_says_what_the_row_says(
    method: Method, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*words: str) -> str:
        assert main(["library", "methods", *words, "--home", str(tmp_path / "home")]) == 0
        return capsys.readouterr().out

    found: dict[str, Any] = json.loads(told(method.name, "--json"))
    assert (found["summary"], found["paper"], found["code"], found["least"]) == (
        method.summary,
        method.paper,
        method.code,
        method.least,
    )
    assert found["differs"] == list(method.differs)
    fields = method.parameters.model_fields
    assert {k: (f["default"], f["description"]) for k, f in found["options"].items()} == {
        name: (field.default, field.description) for name, field in fields.items()
    }
    text = " ".join(told(method.name).split())
    for words in (method.summary, method.paper, method.code):
        assert words in text
    assert all(name in text for name in fields)
    assert re.search(rf"^{method.name} ", told(), re.MULTILINE)
