"""Decisions together with what is to be said at each of their tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from vectors.errors import InputError, ShapeMismatch
from workbench.train.batches import Batch, Decision, check_decisions, collate
from workbench.train.config import TrainConfig
from workbench.train.losses import SoftTargets
from workbench.train.window import vocabulary_of, window_of

__all__ = ["Lesson"]


@dataclass(frozen=True)
class Lesson:
    """What is learnt, or measured.

    Args:
        decisions: steered and replay decisions in any order.
        targets: the teacher's distributions, one for each decision; None for the sampled tokens.
    """

    decisions: Sequence[Decision]
    targets: Sequence[SoftTargets] | None = None

    def check(self, model: PreTrainedModel, config: TrainConfig) -> Lesson:
        """Return the lesson that `config` asks for, having refused what `model` cannot learn.

        Raises:
            InputError, PromptTooLong: decisions that cannot be learnt, or a soft loss without
                targets.
            ShapeMismatch: targets of other decisions.
        """
        check_decisions(self.decisions, window_of(model), vocabulary_of(model))
        if config.loss == "tokens":
            return Lesson(self.decisions)
        if self.targets is None:
            raise InputError(
                "The soft loss needs the teacher's targets; make them, or learn tokens."
            )
        lengths = [len(decision.decision_ids) for decision in self.decisions]
        if [len(target) for target in self.targets] != lengths:
            raise ShapeMismatch(
                "The targets do not have the lengths of the decisions; make them from these very "
                "decisions."
            )
        return self

    def batch(
        self, chosen: Sequence[int], device: torch.device | str
    ) -> tuple[Batch, SoftTargets | None]:
        """Return the chosen decisions as one batch, and their targets in the same order."""
        batch = collate((self.decisions[i] for i in chosen), device)
        if self.targets is None:
            return batch, None
        return batch, SoftTargets.join([self.targets[i] for i in chosen], device)

    def digest(self) -> str:
        """sha256 of decisions and targets."""
        content = hashlib.sha256(repr(tuple(self.decisions)).encode())
        for target in self.targets or ():
            for tensor in (target.ids_NK, target.log_probs_NK, target.log_rest_N):
                content.update(tensor.contiguous().numpy().tobytes())
        return content.hexdigest()
