"""What docs/training.md says of files and options is what is read and taken."""

from __future__ import annotations

import json
import re
from pathlib import Path

from typer.testing import CliRunner

from workbench.cli import app
from workbench.data.chat import parse_chats
from workbench.data.instructions import read_instructions

DOCS = (Path(__file__).parent.parent / "docs" / "training.md").read_text()


def test_the_files_are_read_as_they_are_described(tmp_path):
    chats, instructions = re.findall(r"```json\n(.*?)```", DOCS, re.DOTALL)
    path = tmp_path / "chats.jsonl"
    path.write_text(chats)
    lines = parse_chats(path).lines
    assert {number: chat.decisions for number, chat in lines.items()} == {1: (1, 3), 2: (2,)}
    path = tmp_path / "instructions.jsonl"
    row = json.loads(instructions)
    rows = [{**row, "prompt": f"{row['prompt']} {n}"} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [x.line for x in read_instructions(path)] == [1, 2, 3, 4]


def test_the_options_are_those_of_the_command():
    shown = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).output
    taken = set(re.findall(r"--[a-z-]+", shown))
    assert set(re.findall(r"`(--[a-z-]+)", DOCS)) <= taken
