"""Training from the first step to the last: order, steps, measurements, checkpoints, stop.

Knows nothing about where decisions come from, tokenizers, files of models, or runs.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vectors.errors import Cancelled, InputError
from workbench.train.batches import Decision, order
from workbench.train.best import Best
from workbench.train.checkpoint import load_checkpoint, save_checkpoint
from workbench.train.config import TrainConfig
from workbench.train.contexts import ContextStore, ContextUse
from workbench.train.frozen import freeze_context
from workbench.train.held_out import HeldOutLoss, held_out_loss
from workbench.train.lesson import Lesson
from workbench.train.losses import SoftTargets
from workbench.train.modes import training
from workbench.train.optimizers import make_optimizer
from workbench.train.recorded import RecordedSteps
from workbench.train.step import take_step
from workbench.train.tiers import choose_tier, free_memory

__all__ = ["StepRecord", "TrainResult", "train"]


@dataclass(frozen=True)
class StepRecord:
    """What one step did.

    Args:
        step: counts from 1.
        loss: of the step's batch before it, in nats a token.
        tokens: those that were learnt.
        memory: bytes; the most that was allocated on a GPU, else what the process holds.
        held_out: where it was measured after this step.
        contexts: what became of the step's contexts, where they are reused.
    """

    step: int
    steps: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    memory: int
    held_out: HeldOutLoss | None = None
    contexts: ContextUse | None = None


@dataclass(frozen=True)
class TrainResult:
    """What came out.

    Args:
        weights: every parameter but the embedding and the output matrix, by state name, sharing
            memory with the model.
        steps: steps of the whole run, those before a resume included.
        seconds: wall-clock time of this call.
        before, after: held-out losses of the base and of `weights`, where asked for.
        last: held-out loss after the last step.
        kept_step: the step whose weights these are.
        last_weights: those of the last step, in main memory, where both are kept and they are others.
        tier: the one that was used.
    """

    weights: dict[str, Tensor]
    steps: int
    seconds: float
    before: HeldOutLoss | None
    after: HeldOutLoss | None
    last: HeldOutLoss | None
    kept_step: int
    tier: int
    last_weights: dict[str, Tensor]


def train(
    model: PreTrainedModel,
    decisions: Sequence[Decision],
    targets: Sequence[SoftTargets] | None,
    config: TrainConfig,
    held_out: Lesson | None = None,
    on_step: Callable[[StepRecord], None] = lambda record: None,
    cancelled: Callable[[], bool] = lambda: False,
    checkpoint: Path | None = None,
    contexts: Path | None = None,
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
        contexts: a folder for contexts that are kept on disk, emptied first; default a temporary
            one.

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
    tier = config.tier
    if tier == "auto":
        tier = choose_tier(model, decisions, config.rows, free_memory(model.device)).tier
    with training(model, config.recompute or tier == 3) as weights, ExitStack() as stack:
        optimizer = make_optimizer(weights.values(), config)
        store = _store(config, tier, contexts, stack)
        recorded = _recorded(config, tier, model, weights.values(), optimizer)
        best = Best(config.patience, keep=config.keep != "last" and exam is not None)
        identity = _identity(lesson, config, tier)
        done, before, last = 0, None, None
        if checkpoint is not None and checkpoint.exists():
            done, notes, kept = load_checkpoint(checkpoint, weights, optimizer, identity)
            before = HeldOutLoss(**notes["before"]) if notes["before"] else None
            best.resume(notes["best"], kept, weights)
            if store is not None:
                store.interval = notes["interval"]
        elif exam is not None:
            before = held_out_loss(model, exam, config, tier)

        def save(step: int) -> None:
            if checkpoint is None:
                return
            notes = {
                "before": asdict(before) if before else None,
                "best": best.notes(),
                "interval": store.interval if store is not None else 0,
            }
            other = best.weights if best.step != step else None
            save_checkpoint(checkpoint, weights, optimizer, step, identity, notes, other)

        step = done
        for step in range(done + 1, len(schedule) + 1):  # the last one is needed
            if best.exhausted:
                step -= 1
                break
            if cancelled():
                raise Cancelled(f"Training was stopped after step {step - 1} of {len(schedule)}.")
            started = time.monotonic()
            rate = config.rate_at(step, len(schedule))
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch, target = lesson.batch(schedule[step - 1], model.device)
            if store is not None:
                store.step = step
            read = store or freeze_context
            if recorded is not None:
                loss, norm = recorded.take(batch, target, read)
            else:
                loss, norm = take_step(
                    model, batch, target, weights.values(), optimizer, tier, config.clip, read
                )
            seconds = time.monotonic() - started
            measured = None
            if exam is not None and step % config.held_out_every == 0 and step < len(schedule):
                measured = held_out_loss(model, exam, config, tier)
                best.see(step, measured, weights)
            on_step(
                StepRecord(
                    step,
                    len(schedule),
                    loss,
                    norm,
                    rate,
                    len(batch.labels_N),
                    seconds,
                    _memory(model.device),
                    measured,
                    store.used() if store is not None else None,
                )
            )
            if step % config.checkpoint_every == 0:
                if store is not None:
                    store.clear()
                save(step)
        if step > done and step % config.checkpoint_every:
            # Whatever fails behind the last step need not train again.
            save(step)
        after, kept_step, last_weights = None, step, {}
        if exam is not None:
            last = after = held_out_loss(model, exam, config, tier)
            best.see(step, last, weights)
            if best.weights and best.step != step:
                if config.keep == "both":
                    last_weights = {n: w.detach().to("cpu", copy=True) for n, w in weights.items()}
                best.restore(weights)
                kept_step = best.step
                after = held_out_loss(model, exam, config, tier)
        trained = {name: parameter.detach() for name, parameter in weights.items()}
    seconds = time.monotonic() - began
    return TrainResult(trained, step, seconds, before, after, last, kept_step, tier, last_weights)


def _store(
    config: TrainConfig, tier: int, folder: Path | None, stack: ExitStack
) -> ContextStore | None:
    if config.reuse == "off":
        return None
    if tier != 2:
        raise InputError(
            f"Contexts are reused where they are frozen, at tier 2, and this run takes tier {tier}; "
            "set tier 2, or leave the reuse of contexts off."
        )
    if config.reuse == "disk" and folder is None:
        folder = Path(stack.enter_context(TemporaryDirectory()), "contexts")
    # All are forgotten at each save, so that a resumed run reads what the whole one reads.
    most = config.checkpoint_every // 2
    return ContextStore(config.reuse, config.refresh_every, config.staleness, folder, most)


def _recorded(
    config: TrainConfig,
    tier: int,
    model: PreTrainedModel,
    weights: Iterable[nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> RecordedSteps | None:
    if not config.recorded:
        return None
    if tier != 2:
        raise InputError(
            f"Steps are recorded where contexts are frozen, at tier 2, and this run takes tier {tier}; "
            "set tier 2, or do not record."
        )
    return RecordedSteps(model, weights, optimizer, config.clip)


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def _identity(lesson: Lesson, config: TrainConfig, tier: int) -> str:
    """Digest of all that decides the weights of every step; how often it is measured does not.

    Kept contexts are read again at every save, so that with them the saves decide as well; and where
    the best weights are looked for, the measurements do.
    """
    idle = {"tier"}
    if config.reuse == "off":
        idle.add("checkpoint_every")
    if not config.patience and config.keep == "last":
        idle.add("held_out_every")
    settings = config.model_dump_json(exclude=idle)
    return hashlib.sha256(f"{settings} {tier} {lesson.digest()}".encode()).hexdigest()
