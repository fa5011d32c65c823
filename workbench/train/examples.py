"""Decisions together with who says what is right at their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from workbench.runs.process import Progress
from workbench.train.batches import Decision
from workbench.train.losses import SoftTargets
from workbench.train.teacher import targets
from workbench.train.window import vocabulary_of

__all__ = ["Example", "teach"]


@dataclass(frozen=True)
class Example:
    """A decision as the student sees it.

    Args:
        decision: context and tokens of the student.
        taught_by: "model" learns the base's own distributions (steered, instructed or plain);
            "itself" learns the decision's tokens, where a person wrote them.
        instructed_ids: the teacher's context where it is another than the student's.
    """

    decision: Decision
    taught_by: Literal["model", "itself"] = "model"
    instructed_ids: tuple[int, ...] | None = None

    @property
    def read_by_teacher(self) -> Decision:
        """The decision after the context that the teacher sees."""
        if self.instructed_ids is None:
            return self.decision
        return replace(self.decision, context_ids=self.instructed_ids)


def teach(
    model: Any,
    examples: Sequence[Example],
    additions: Mapping[int, Tensor],
    k: int,
    progress: Progress,
) -> list[SoftTargets]:
    """Return what is to be said at every decision token, in the order of `examples`.

    Args:
        model: the base, before training.
        additions: the steering vector of steered decisions, by block; empty without one.
        k: tokens kept of each distribution.

    Raises:
        InputError, PromptTooLong: decisions that cannot be learnt.
    """
    asked = [i for i, example in enumerate(examples) if example.taught_by == "model"]
    found: dict[int, SoftTargets] = {}
    if asked:
        read = [examples[i].read_by_teacher for i in asked]
        found.update(zip(asked, targets(model, read, additions, k, 8, progress), strict=True))
    for index, example in enumerate(examples):
        if index not in found:
            labels_N = torch.tensor(example.decision.decision_ids)
            found[index] = SoftTargets.certain(labels_N, k, vocabulary_of(model))
    return [found[i] for i in range(len(examples))]
