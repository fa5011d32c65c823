"""Decisions of a person's own: a chat file, instructions to strip, one side of a contrast set."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from vectors.errors import InputError, RunFailed
from workbench.data.chat import Chat, ChatFile
from workbench.data.contrast import ContrastPair, ContrastSet
from workbench.data.instructions import Instructed
from workbench.data.templates import context_ids, instructed, turn_ids
from workbench.engines.base import Message
from workbench.runs.process import Progress
from workbench.train.answers import Desk, answers, check_room, training_prompts
from workbench.train.batches import Decision
from workbench.train.examples import Example
from workbench.train.sources import HELD_OUT_DECISIONS, Written, set_aside

__all__ = ["ChatSource", "InstructionSource", "SideSource", "chat_decisions", "turn_decision"]

MOST_HELD_OUT = 48


@dataclass(frozen=True)
class ChatSource:
    """The marked assistant turns of a chat file, as a person wrote them.

    A fifth of the conversations, at most 48, is held out, chosen by the hash of their content, and
    those that begin alike together, so that nobody is asked what was learnt; of fewer than five none is.
    Where too many begin alike, those that are equal stay together.
    """

    file: ChatFile

    additions: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def about(self) -> dict[str, Any]:
        return {"source": "chat", "file": self.file.path, "file_digest": self.file.digest}

    def write(self, desk: Desk, progress: Progress) -> Written:
        progress(0.0, f"reading {len(self.file.lines)} conversations")
        held = _held_out(self.file)
        learnt: list[Example] = []
        held_out: list[Example] = []
        for number, decision in chat_decisions(desk.tokenizer, self.file, "steered"):
            (held_out if number in held else learnt).append(Example(decision, "itself"))
        return Written(learnt, held_out, len(learnt) + len(held_out))


def _held_out(file: ChatFile) -> set[int]:
    """Numbers of the lines that are held out."""
    room = min(MOST_HELD_OUT, len(file.lines) // 5)
    return _whole_groups(file, room, _beginning) or _whole_groups(file, room, lambda c: c.key)


def _beginning(chat: Chat) -> str:
    return repr(chat.before(chat.decisions[0]))


def _whole_groups(file: ChatFile, room: int, alike: Callable[[Chat], str]) -> set[int]:
    """Lines in the order of their hashes, as many as there is room for, those that are alike together."""
    groups: dict[str, list[int]] = {}
    for number in sorted(file.lines, key=lambda number: file.lines[number].key):
        groups.setdefault(alike(file.lines[number]), []).append(number)
    held: set[int] = set()
    for numbers in groups.values():
        if len(held) + len(numbers) <= room:
            held.update(numbers)
    return held


@dataclass(frozen=True)
class InstructionSource:
    """Instruction stripping: written and taught with the instructions, learnt without them.

    The model that is trained reads the prompt alone. At each token of the decision it learns the
    distribution that the base has there with the instructions in its context.
    """

    instructed: str | Sequence[Instructed]
    held_out: Sequence[Instructed] = ()
    origin: dict[str, Any] = field(default_factory=dict)

    additions: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def about(self) -> dict[str, Any]:
        return {"source": "instructions", **self.origin}

    def write(self, desk: Desk, progress: Progress) -> Written:
        asked = self._asked(desk)
        shown = _stripping(desk, asked[0])
        progress.event(kind="stripped", **shown)
        with_instructions = [_asking(desk, row) for row in (*asked, *self.held_out)]
        words = f"writing with instructions ({shown['tokens']} tokens, stripped {shown['left']})"
        found = answers(desk, with_instructions, "", "steered", progress, words)
        if len(found) < 2:
            raise RunFailed(
                f"With the instructions, the engine wrote {len(found)} usable decisions; give more "
                "prompts or longer answers."
            )
        examples = {n: _stripped(desk, (*asked, *self.held_out)[n], d) for n, d in found}
        if self.held_out:
            learnt = [e for n, e in examples.items() if n < len(asked)]
            held = [e for n, e in examples.items() if n >= len(asked)]
        else:
            learnt, held = set_aside(list(examples.values()))
        return Written(learnt, held, len(asked), {"stripped.json": json.dumps(shown, indent=1)})

    def _asked(self, desk: Desk) -> list[Instructed]:
        if not isinstance(self.instructed, str):
            return list(self.instructed)
        count = desk.prompts + HELD_OUT_DECISIONS
        prompts = training_prompts((), count, desk.config.seed)
        return [Instructed(self.instructed, prompt) for prompt in prompts]


@dataclass(frozen=True)
class SideSource:
    """One side of a contrast set's completions, preferred: its tokens are learnt."""

    side: Literal["positive", "negative"]
    contrast: ContrastSet
    origin: dict[str, Any] = field(default_factory=dict)

    additions: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def about(self) -> dict[str, Any]:
        return {"source": "preference", "side": self.side, **self.origin}

    def write(self, desk: Desk, progress: Progress) -> Written:
        progress(0.0, f"reading {len(self.contrast.train)} {self.side} completions")
        learnt, held_out = [
            [Example(self._preferred(desk, pair), "itself") for pair in pairs]
            for pairs in (self.contrast.train, self.contrast.held_out)
        ]
        return Written(learnt, held_out, len(learnt))

    def _preferred(self, desk: Desk, pair: ContrastPair) -> Decision:
        said = getattr(pair, self.side)
        return turn_decision(desk.tokenizer, pair.prompt, said, self.contrast.line(pair))


def chat_decisions(
    tokenizer: Any, file: ChatFile, kind: Literal["steered", "replay"]
) -> list[tuple[int, Decision]]:
    """Every marked turn of a file with its line number."""
    found = []
    for number, chat in file.lines.items():
        for index in chat.decisions:
            try:
                context = context_ids(tokenizer, chat.before(index))
                said = turn_ids(tokenizer, chat.before(index + 1))
            except InputError as error:
                raise InputError(f"Line {number} of '{file.path}': {error}") from error
            found.append((number, Decision(context, said, kind, number)))
    return found


def turn_decision(tokenizer: Any, prompt: str, text: str, line: int) -> Decision:
    """A prompt and the reply to learn, as one decision."""
    messages: tuple[Message, ...] = (
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": text},
    )
    context = context_ids(tokenizer, messages[:1])
    return Decision(context, turn_ids(tokenizer, messages), "steered", line)


def _stripped(desk: Desk, row: Instructed, written: Decision) -> Example:
    context = context_ids(desk.tokenizer, row.stripped)
    decision = Decision(context, written.decision_ids, "steered", row.line)
    return Example(decision, "model", written.context_ids)


def _asking(desk: Desk, row: Instructed) -> tuple[Message, ...]:
    """What the engine is asked, which must leave room for its answer."""
    messages = instructed(desk.tokenizer, row.instructions, row.prompt)
    which = f"The prompt of line {row.line}" if row.line else "A prompt"
    check_room(desk, messages, f"{which} with its instructions")
    return messages


def _stripping(desk: Desk, row: Instructed) -> dict[str, Any]:
    """One context before and after its instructions are taken out, to be shown and kept."""
    full = context_ids(desk.tokenizer, _asking(desk, row))
    left = context_ids(desk.tokenizer, row.stripped)
    return {
        "instructions": row.instructions,
        "with_instructions": desk.tokenizer.decode(full),
        "stripped": desk.tokenizer.decode(left),
        "tokens": len(full),
        "left": len(left),
    }
