"""Chat files: conversations whose marked assistant turns are learnt.

One JSON object a line, UTF-8:

    {"messages": [{"role": "user", "content": "..."},
                  {"role": "assistant", "content": "...", "decision": true}]}

Roles are system (first only), user and assistant. The assistant turns with `"decision": true` are
the decisions of the line, and everything before each of them is its context. A line that says nothing of
decisions has one, its last turn, which must be the assistant's. Files for replay may hold lines of
another kind as well, a prompt that the base answers itself: {"prompt": "..."}.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    model_validator,
)

from vectors.errors import InputError
from workbench.engines.base import Message

__all__ = ["Chat", "ChatFile", "Turn", "json_lines", "parse_chats", "read_text"]

LONGEST = 400_000
MOST_BYTES = 200 * 2**20
SHOWN = 5


class Turn(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    role: Literal["system", "user", "assistant"]
    content: str = Field(max_length=LONGEST)
    decision: StrictBool = False


class Chat(BaseModel):
    """One line: a conversation with at least one decision, or a prompt alone, for replay."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    messages: tuple[Turn, ...] = ()
    prompt: str = Field(default="", max_length=LONGEST)
    tags: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _learnable(self) -> Chat:
        if self.prompt:
            if self.messages:
                raise ValueError("has messages and a prompt; give one of them")
            if not self.prompt.strip():
                raise ValueError("has an empty prompt")
            return self
        if not self.messages:
            raise ValueError("needs 'messages'")
        for number, turn in enumerate(self.messages, start=1):
            if turn.role == "system" and number > 1:
                raise ValueError(f"has a system message as number {number}; it must be the first")
            if turn.decision and turn.role != "assistant":
                raise ValueError(f"marks message {number} of the {turn.role}; mark the assistant's")
            if not turn.content.strip():
                what = "decision" if number - 1 in self.decisions else "message"
                raise ValueError(f"has an empty {what} (message {number})")
        if not self.decisions:
            raise ValueError("has no decision: mark an assistant turn, or end with one")
        if not any(turn.role == "user" for turn in self.messages[: self.decisions[0]]):
            raise ValueError("has a decision with no user message before it")
        return self

    @property
    def decisions(self) -> tuple[int, ...]:
        """Indices of the turns to learn."""
        marked = tuple(i for i, turn in enumerate(self.messages) if turn.decision)
        chosen = any("decision" in turn.model_fields_set for turn in self.messages)
        if chosen or not self.messages or self.messages[-1].role != "assistant":
            return marked
        return (len(self.messages) - 1,)

    def before(self, index: int) -> tuple[Message, ...]:
        """The messages before turn `index`, as an engine takes them."""
        return tuple({"role": t.role, "content": t.content} for t in self.messages[:index])

    @property
    def key(self) -> str:
        """sha256 of the line's content, by which conversations are split."""
        return hashlib.sha256(self.model_dump_json(exclude={"tags"}).encode()).hexdigest()


@dataclass(frozen=True)
class ChatFile:
    """The checked lines of a file, by line number."""

    path: str
    lines: dict[int, Chat]
    digest: str


def parse_chats(path: Path, *, prompts: bool = False) -> ChatFile:
    """Read and check a chat file.

    Args:
        prompts: lines that are a prompt alone are allowed, as replay has them.

    Raises:
        InputError: it cannot be read, is empty, or has wrong lines; the message names up to five.
    """
    text = read_text(path)
    lines, problems = {}, []
    for number, line in json_lines(text):
        try:
            chat = Chat.model_validate_json(line)
            if chat.prompt and not prompts:
                raise InputError("is a prompt without an answer; give 'messages'")
            lines[number] = chat
        except ValidationError as error:
            problems.append(f"line {number} {_why(error)}")
        except InputError as error:
            problems.append(f"line {number} {error}")
    if problems:
        more = f"; and {len(problems) - SHOWN} more lines" if len(problems) > SHOWN else ""
        raise InputError(f"The file '{path}' cannot be used: {'; '.join(problems[:SHOWN])}{more}.")
    if not lines:
        raise InputError(f"The file '{path}' is empty; write one JSON object a line.")
    return ChatFile(str(path), lines, hashlib.sha256(text.encode()).hexdigest())


def json_lines(text: str) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    # Not splitlines: it would cut a text at U+2028 and the like, which JSON allows inside one.
    return [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]


def read_text(path: Path) -> str:
    """Read a UTF-8 file.

    Raises:
        InputError: it cannot be read, is too large, or is not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"The file '{path}' cannot be read: {why}.") from error
    if len(raw) > MOST_BYTES:
        raise InputError(f"The file '{path}' is over {MOST_BYTES >> 20} MB; use a part of it.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(
            f"The file '{path}' is not UTF-8 text (line {line}); save it as UTF-8 and try again."
        ) from error


def _why(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("json_invalid", "model_type"):
        return (
            "is not a JSON object (a line holds one whole object)"
            if not where
            else f"has no object in '{where}'"
        )
    if first["type"] == "extra_forbidden":
        return f"has an unknown field '{where[:60]}'"
    words = first["msg"].removeprefix("Value error, ")
    return words if not where else f"'{where}': {words[0].lower()}{words[1:]}"
