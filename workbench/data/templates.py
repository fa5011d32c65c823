"""Prompts and completions as token ids, through the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from vectors.errors import InputError, PromptTooLong
from workbench.engines.base import Message

__all__ = ["Sample", "context_ids", "instructed", "sample", "turn_ids"]


@dataclass(frozen=True)
class Sample:
    """A context, and the completion that follows it."""

    context: tuple[int, ...]
    completion: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.context) + len(self.completion)


def context_ids(tokenizer: Any, messages: Sequence[Message]) -> tuple[int, ...]:
    """The messages through the chat template, up to where the assistant begins to speak.

    Raises:
        InputError: the template refuses these messages.
    """
    try:
        ids = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
    except TemplateError as error:
        raise InputError(
            f"The model's chat template refuses this conversation ({error}); change its roles."
        ) from error
    return tuple(int(i) for i in ids)


def instructed(tokenizer: Any, instructions: str, prompt: str) -> tuple[Message, ...]:
    """A prompt under instructions: a system message, or where the template has none, before the prompt."""
    asked: Message = {"role": "user", "content": prompt}
    messages: tuple[Message, ...] = ({"role": "system", "content": instructions}, asked)
    try:
        if instructions.strip() in _rendered(tokenizer, list(messages), True):
            return messages
    except InputError:
        pass
    return ({"role": "user", "content": f"{instructions}\n\n{prompt}"},)


def turn_ids(tokenizer: Any, messages: Sequence[Message]) -> tuple[int, ...]:
    """The last message, the assistant's, as the tokens that the model is to say, its end included.

    They are what the template adds when the turn is there: text and end of turn, without the line
    break that some templates write after it. Where the template writes history in another way than
    it opens a turn, they are the text and the end of the sequence.

    Raises:
        InputError: the template refuses these messages.
    """
    before, whole = [
        _rendered(tokenizer, list(part), opens)
        for part, opens in ((messages[:-1], True), (messages, False))
    ]
    content = str(messages[-1]["content"])
    said = whole.removeprefix(before).rstrip() if whole.startswith(before) else content.strip()
    ids = [int(i) for i in tokenizer(said, add_special_tokens=False)["input_ids"]]
    if said.endswith(content.strip()) and tokenizer.eos_token_id is not None:
        ids.append(int(tokenizer.eos_token_id))
    return tuple(ids)


def _rendered(tokenizer: Any, messages: list[Message], opens: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=opens, tokenize=False)
    except TemplateError as error:
        raise InputError(
            f"The model's chat template refuses this conversation ({error}); change its roles."
        ) from error


def sample(
    tokenizer: Any, prompt: str, completion: str, *, system: str = "", window: int = 1 << 30
) -> Sample:
    """A prompt and a reply to it.

    Raises:
        PromptTooLong: together they leave no position of the window.
    """
    messages: Sequence[Message] = [{"role": "user", "content": prompt}]
    if system:
        messages = instructed(tokenizer, system, prompt)
    made = Sample(
        context_ids(tokenizer, messages),
        tuple(tokenizer(completion, add_special_tokens=False)["input_ids"]),
    )
    if len(made) >= window:
        raise PromptTooLong(
            f"The prompt '{prompt[:40]}' and its reply have {len(made)} tokens, and the window holds "
            f"{window}, one of them free; shorten them, or start the engine with a longer window."
        )
    return made
