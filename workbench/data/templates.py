"""Prompts and completions as token ids, through the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vectors.errors import PromptTooLong
from workbench.engines.base import Message

__all__ = ["Sample", "context_ids", "sample"]


@dataclass(frozen=True)
class Sample:
    """A context, and the completion that follows it."""

    context: tuple[int, ...]
    completion: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.context) + len(self.completion)


def context_ids(tokenizer: Any, messages: Sequence[Message]) -> tuple[int, ...]:
    """The messages through the chat template, up to where the assistant begins to speak."""
    ids = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    return tuple(int(i) for i in ids)


def sample(
    tokenizer: Any, prompt: str, completion: str, *, system: str = "", window: int = 1 << 30
) -> Sample:
    """A prompt and a reply to it.

    Raises:
        PromptTooLong: together they do not fit the window.
    """
    messages: list[Message] = [{"role": "user", "content": prompt}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    made = Sample(
        context_ids(tokenizer, messages),
        tuple(tokenizer(completion, add_special_tokens=False)["input_ids"]),
    )
    if len(made) > window:
        raise PromptTooLong(
            f"The prompt '{prompt[:40]}' and its reply have {len(made)} tokens, and the model's window "
            f"holds {window}; shorten them."
        )
    return made
