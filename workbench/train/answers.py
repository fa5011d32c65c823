"""Decisions that the engine writes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vectors.errors import PromptTooLong
from workbench.data.templates import context_ids
from workbench.engines.base import Engine, Message, Request, Sampling
from workbench.models.catalog import Model
from workbench.runs.process import Progress
from workbench.settings import WINDOW
from workbench.train.batches import Decision
from workbench.train.config import TrainConfig
from workbench.verify.measure import read_prompts

__all__ = ["Desk", "answers", "check_room", "training_prompts"]

CHUNK = 24
TEMPERATURE = 0.8


@dataclass(frozen=True)
class Desk:
    """What the sources of decisions write with.

    Args:
        engine: gives the engine, started when first asked for: not every source needs one.
        info: the base on the disk.
        tokenizer: of the base.
        config: the settings of the run; its seed decides what is written.
        prompts: how many decisions to write, where a source writes them.
        tokens: longest decision that is written.
    """

    engine: Callable[[], Engine]
    info: Model
    tokenizer: Any
    config: TrainConfig
    prompts: int
    tokens: int


def answers(
    desk: Desk,
    chats: Sequence[tuple[Message, ...]],
    steer: str,
    kind: Literal["steered", "replay"],
    progress: Progress,
    words: str = "",
) -> list[tuple[int, Decision]]:
    """Let the engine answer `chats` and return the usable answers with their chats' numbers.

    An answer of fewer than two tokens is left out. An answer that ended by itself ends in the end
    of the turn, so that the student learns to stop there.
    """
    tokenizer, seed = desk.tokenizer, desk.config.seed
    found: list[tuple[int, Decision]] = []
    for start in range(0, len(chats), CHUNK):
        what = words or f"writing {kind} decisions"
        progress(start / len(chats), f"{what}, {start} of {len(chats)}")
        chunk = chats[start : start + CHUNK]
        sampling = [
            Sampling(desk.tokens, TEMPERATURE, 1.0, seed * 100_003 + start + i)
            for i in range(len(chunk))
        ]
        requests = [Request(c, steer, sampling=s) for c, s in zip(chunk, sampling, strict=True)]
        for index, reply in enumerate(desk.engine().generate(requests, progress.cancelled)):
            ids = list(tokenizer(reply.text, add_special_tokens=False)["input_ids"])
            if reply.finish == "stop" and tokenizer.eos_token_id is not None:
                ids.append(tokenizer.eos_token_id)
            if len(ids) >= 2:
                context = context_ids(tokenizer, chunk[index])
                number = start + index
                found.append((number, Decision(context, tuple(ids), kind, number)))
    return found


def check_room(desk: Desk, messages: Sequence[Message], which: str) -> None:
    """Refuse what leaves the engine no room for an answer; `which` begins the sentence.

    Raises:
        PromptTooLong: it does.
    """
    length, window = len(context_ids(desk.tokenizer, messages)), desk.engine().window
    if length + desk.tokens > window:
        raise PromptTooLong(
            f"{which} has {length} tokens, which leaves no room for an answer of {desk.tokens} in the "
            f"engine's {window}; shorten it, or set {WINDOW} higher."
        )


def training_prompts(own: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` prompts: half of them `own`, then general ones, each once until they run out."""
    own = list(dict.fromkeys(own))
    general = [row["prompt"] for row in read_prompts("training") if row["prompt"] not in set(own)]
    rng = random.Random(seed)
    rng.shuffle(own)
    rng.shuffle(general)
    pool = [*own[: count // 2], *general, *own[count // 2 :]]
    chosen = [pool[i % len(pool)] for i in range(count)]
    rng.shuffle(chosen)
    return chosen
