"""The loss on decisions that are never learnt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from workbench.train.config import TrainConfig
from workbench.train.lesson import Lesson
from workbench.train.step import decision_loss

__all__ = ["HeldOutLoss", "held_out_loss"]


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean loss in nats for each token, None where there is no such decision.

    `steered` is what is being learnt; `general` is replay text, hence the measure of forgetting.
    """

    steered: float | None
    general: float | None


@torch.no_grad()
def held_out_loss(
    model: PreTrainedModel, lesson: Lesson, config: TrainConfig, tier: int
) -> HeldOutLoss:
    """Return the losses of `lesson`, weighted by tokens; its contexts are always read afresh."""
    means: dict[str, float | None] = {}
    for kind in ("steered", "replay"):
        members = [i for i, d in enumerate(lesson.decisions) if d.kind == kind]
        members.sort(key=lambda i: len(lesson.decisions[i].decision_ids))
        total = tokens = 0.0
        for start in range(0, len(members), config.batch):
            batch, target = lesson.batch(members[start : start + config.batch], model.device)
            count = len(batch.labels_N)
            total += decision_loss(model, batch, target, tier).item() * count
            tokens += count
        means[kind] = total / tokens if tokens else None
    return HeldOutLoss(means["steered"], means["replay"])
