"""General decisions that keep the rest of the model as it was."""

from __future__ import annotations

from workbench.data.chat import ChatFile
from workbench.engines.base import Message
from workbench.runs.process import Progress
from workbench.train.answers import Desk, answers, check_room
from workbench.train.data_sources import chat_decisions
from workbench.train.examples import Example
from workbench.verify.measure import read_prompts

__all__ = ["write_replay"]

FEWEST = 8


def write_replay(
    desk: Desk, asked: int, file: ChatFile | None, progress: Progress
) -> tuple[list[Example], list[Example]]:
    """Return replay examples to learn and held-out ones, taught by the base itself.

    Prompts, the built-in ones or a file's, are answered by the base; a file's conversations are
    read as they are. A tenth is held out and is the measure of forgetting; without replay to learn,
    a few are written for that alone.

    Args:
        asked: decisions that are learnt; as many replay decisions are written as their share of
            `config.replay` needs, at least 8, as far as there are prompts.
        file: the person's own replay.
    """
    share = desk.config.replay
    wanted = max(round(asked * share / (1 - share)), FEWEST)
    found: list[Example] = []
    if file is None:
        prompts = [row["prompt"] for row in read_prompts("replay")]
    else:
        own = {n: chat.prompt for n, chat in file.lines.items() if chat.prompt}
        for n, prompt in own.items():
            question: Message = {"role": "user", "content": prompt}
            check_room(desk, [question], f"The replay prompt of line {n}")
        prompts = list(own.values())
        found = [Example(d) for _, d in chat_decisions(desk.tokenizer, file, "replay")][:wanted]
    chats: list[tuple[Message, ...]] = [
        ({"role": "user", "content": prompt},) for prompt in prompts[: wanted - len(found)]
    ]
    written = answers(desk, chats, "", "replay", progress)
    found += [Example(decision) for _, decision in written]
    if not share:
        return [], found
    spare = max(1, len(found) // 10) if len(found) > 1 else 0
    return found[spare:], found[:spare]
