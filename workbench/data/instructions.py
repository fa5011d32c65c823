"""Instructions that are to move from the context into the weights.

A text file (.txt, .md or any other ending) is one instruction for every general prompt. A .jsonl or
.json file has a prompt, and the instruction for it, on each line:

    {"instructions": "Answer in one sentence.", "prompt": "Why is the sky blue?"}
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vectors.errors import InputError
from workbench.data.chat import json_lines, read_text
from workbench.engines.base import Message

__all__ = ["Instructed", "read_instructions"]

LONGEST = 100_000
FEWEST = 4


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)
    instructions: str = Field(min_length=1, max_length=LONGEST)
    prompt: str = Field(min_length=1, max_length=LONGEST)


@dataclass(frozen=True)
class Instructed:
    """A prompt and the instructions that stand before it while the decision is written."""

    instructions: str
    prompt: str
    line: int = 0

    @property
    def stripped(self) -> tuple[Message, ...]:
        """What the trained model will see."""
        return ({"role": "user", "content": self.prompt},)


def read_instructions(path: Path) -> str | list[Instructed]:
    """Read one instruction for all prompts, or a prompt with its instruction for each line.

    Raises:
        InputError: unreadable, empty, or with wrong lines, whose numbers the message names.
    """
    text = read_text(path)
    if path.suffix.lower() not in (".jsonl", ".json"):
        if not text.strip():
            raise InputError(f"The file '{path}' is empty; write the instructions into it.")
        if len(text) > LONGEST:
            raise InputError(f"The instructions in '{path}' are over {LONGEST} characters.")
        return text.strip()
    found, problems = [], []
    for number, line in json_lines(text):
        try:
            row = _Line.model_validate_json(line)
            found.append(Instructed(row.instructions, row.prompt, number))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the line"
            problems.append(f"line {number}, {where}: {first['msg'].lower()}")
    if problems:
        raise InputError(f"The file '{path}' cannot be used: {'; '.join(problems[:5])}.")
    if (prompts := len({row.prompt for row in found})) < FEWEST:
        raise InputError(
            f"The file '{path}' has {prompts} different prompts; at least {FEWEST} are needed to learn from "
            "some and measure on others."
        )
    return found
