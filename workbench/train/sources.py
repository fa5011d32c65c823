"""Where decisions come from, and the first such place: a steering vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from vectors.errors import RunFailed
from vectors.types import SteeringVector
from workbench.data.contrast import ContrastPair
from workbench.data.templates import sample
from workbench.runs.process import Progress
from workbench.train.answers import Desk, answers, training_prompts
from workbench.train.batches import Decision
from workbench.train.examples import Example

__all__ = ["HELD_OUT_DECISIONS", "Source", "VectorSource", "Written", "set_aside"]

HELD_OUT_DECISIONS = 12


@dataclass(frozen=True)
class Written:
    """What a source gives: examples to learn and held-out ones, and files that are kept with them.

    `asked` is the number of decisions that replay is a share of.
    """

    learnt: list[Example]
    held_out: list[Example]
    asked: int
    files: dict[str, str] = field(default_factory=dict)


class Source(Protocol):
    """Makes the decisions of a run. `additions` steer the teacher, by block."""

    @property
    def additions(self) -> Mapping[int, Tensor]: ...

    @property
    def about(self) -> dict[str, Any]: ...

    def write(self, desk: Desk, progress: Progress) -> Written: ...


def set_aside(found: list[Example]) -> tuple[list[Example], list[Example]]:
    """Split written examples into those to learn and held-out ones, by the order of their prompts.

    A prompt may come several times; it is learnt, or it is held out. A single one is learnt.
    """
    prompts = list(dict.fromkeys(example.decision.context_ids for example in found))
    few = HELD_OUT_DECISIONS if len(prompts) > 4 * HELD_OUT_DECISIONS else max(1, len(prompts) // 5)
    held = set(prompts[:few]) if len(prompts) > 1 else set()
    return (
        [example for example in found if example.decision.context_ids not in held],
        [example for example in found if example.decision.context_ids in held],
    )


@dataclass(frozen=True)
class VectorSource:
    """Steered distillation: the steered engine answers, the steered base teaches.

    Args:
        pairs: training pairs, whose prompts come first among the training prompts.
        read_pairs: learn what the steered model says at each token of `pairs`, too, both sides.
    """

    vector: SteeringVector
    digest: str
    dose: float
    pairs: Sequence[ContrastPair]
    read_pairs: bool = True

    @property
    def additions(self) -> Mapping[int, Tensor]:
        block = self.vector.best_block
        return {block: self.vector.addition(block, self.dose)}

    @property
    def about(self) -> dict[str, Any]:
        about = {"source": "vector", "vector": self.digest, "dose": self.dose}
        return {**about, "block": self.vector.best_block, "read_pairs": self.read_pairs}

    def write(self, desk: Desk, progress: Progress) -> Written:
        prompts = training_prompts(
            [pair.prompt for pair in self.pairs],
            desk.prompts + HELD_OUT_DECISIONS,
            desk.config.seed,
        )
        steer = f"{self.digest}={self.dose!r}"
        found = answers(
            desk, [({"role": "user", "content": p},) for p in prompts], steer, "steered", progress
        )
        if len(found) <= HELD_OUT_DECISIONS:
            raise RunFailed(
                f"The steered engine wrote only {len(found)} usable decisions; lower the dose and "
                "try again."
            )
        learnt, held_out = set_aside([Example(decision) for _, decision in found])
        if self.read_pairs:
            # Of prompts that are held out nothing is learnt, or the exam would be known beforehand.
            held = {example.decision.context_ids for example in held_out}
            texts = _both_sides(desk.tokenizer, self.pairs)
            learnt += [Example(text) for text in texts if text.context_ids not in held]
        return Written(learnt, held_out, len(prompts))


def _both_sides(tokenizer: Any, pairs: Sequence[ContrastPair]) -> list[Decision]:
    """Both sides of each pair, to be learnt as the steered model reads them.

    The engine's own decisions show what the direction leads to, and none of what it leads away
    from; without these texts that half is learnt poorly (docs/adr/0008).
    """
    end = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    found = []
    for number, pair in enumerate(pairs):
        for text in (pair.positive, pair.negative):
            made = sample(tokenizer, pair.prompt, text)
            found.append(Decision(made.context, (*made.completion, *end), "steered", number))
    return found
