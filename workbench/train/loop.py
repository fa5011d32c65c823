"""Training from the first step to the last: order, steps, measurements, checkpoints, stop.

Knows nothing about where decisions come from, tokenizers, files of models, or runs.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from vectors.errors import Cancelled
from workbench.train.batches import Decision, order
from workbench.train.checkpoint import load_checkpoint, save_checkpoint
from workbench.train.config import TrainConfig
from workbench.train.held_out import HeldOutLoss, held_out_loss
from workbench.train.lesson import Lesson
from workbench.train.losses import SoftTargets
from workbench.train.modes import training
from workbench.train.optimizers import make_optimizer
from workbench.train.step import take_step

__all__ = ["StepRecord", "TrainResult", "train"]


@dataclass(frozen=True)
class StepRecord:
    """What one step did; `step` counts from 1, `tokens` are those that were learnt."""

    step: int
    steps: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    held_out: HeldOutLoss | None = None


@dataclass(frozen=True)
class TrainResult:
    """What came out.

    Args:
        weights: every parameter but the embedding and the output matrix, by state name, sharing
            memory with the model.
        steps: steps of the whole run, those before a resume included.
        seconds: wall-clock time of this call.
        before, after: held-out losses of the base and of the trained model, where asked for.
    """

    weights: dict[str, Tensor]
    steps: int
    seconds: float
    before: HeldOutLoss | None
    after: HeldOutLoss | None


def train(
    model: PreTrainedModel,
    decisions: Sequence[Decision],
    targets: Sequence[SoftTargets] | None,
    config: TrainConfig,
    held_out: Lesson | None = None,
    on_step: Callable[[StepRecord], None] = lambda record: None,
    cancelled: Callable[[], bool] = lambda: False,
    checkpoint: Path | None = None,
) -> TrainResult:
    """Learn `decisions` and leave the model trained.

    Args:
        model: the base, float32 or bfloat16; its weights move in place.
        decisions: steered and replay decisions in any order.
        targets: the teacher's distributions, one for each decision; not needed where
            `config.loss` is "tokens".
        config: the settings.
        held_out: measured before, after, and every `config.held_out_every` steps.
        on_step: told of every step.
        cancelled: asked before every step.
        checkpoint: a file to save to every `config.checkpoint_every` steps, and to go on from
            where it is there.

    Raises:
        InputError, PromptTooLong: decisions that cannot be learnt, a soft loss without targets, or
            a checkpoint of another run.
        ShapeMismatch: targets that do not fit the decisions.
        Cancelled: `cancelled` said so; the weights are those of the last whole step.
        RunFailed: a loss or gradient that is not finite.
        OutOfSpace: a checkpoint that cannot be written.
    """
    began = time.monotonic()
    lesson = Lesson(decisions, targets).check(model, config)
    exam = held_out.check(model, config) if held_out is not None else None
    schedule = order(decisions, config.batch, config.replay, config.passes, config.seed)
    with training(model) as weights:
        optimizer = make_optimizer(weights.values(), config)
        identity = _identity(lesson, config)
        done, before, after = 0, None, None
        if checkpoint is not None and checkpoint.exists():
            done, notes = load_checkpoint(checkpoint, weights, optimizer, identity)
            before = HeldOutLoss(**notes["before"]) if notes["before"] else None
        elif exam is not None:
            before = held_out_loss(model, exam, config)
        for step in range(done + 1, len(schedule) + 1):
            if cancelled():
                raise Cancelled(f"Training was stopped after step {step - 1} of {len(schedule)}.")
            started = time.monotonic()
            rate = config.rate_at(step, len(schedule))
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch, target = lesson.batch(schedule[step - 1], model.device)
            loss, norm = take_step(
                model, batch, target, weights.values(), optimizer, config.tier, config.clip
            )
            seconds = time.monotonic() - started
            measured = None
            if exam is not None and step % config.held_out_every == 0 and step < len(schedule):
                measured = held_out_loss(model, exam, config)
            tokens = len(batch.labels_N)
            on_step(StepRecord(step, len(schedule), loss, norm, rate, tokens, seconds, measured))
            if checkpoint is not None and step % config.checkpoint_every == 0:
                notes = {"before": asdict(before) if before else None}
                save_checkpoint(checkpoint, weights, optimizer, step, identity, notes)
        if exam is not None:
            after = held_out_loss(model, exam, config)
        trained = {name: parameter.detach() for name, parameter in weights.items()}
    return TrainResult(trained, len(schedule), time.monotonic() - began, before, after)


def _identity(lesson: Lesson, config: TrainConfig) -> str:
    """Digest of all that decides the weights of every step; how often it is measured does not."""
    settings = config.model_dump_json(exclude={"held_out_every", "checkpoint_every"})
    return hashlib.sha256(f"{settings} {lesson.digest()}".encode()).hexdigest()
