"""Train a behaviour into the weights: decisions, targets, training, task vector.

write     the source gives decisions (most let the engine write them); the base answers replay
teach     the base says what is right at every token: steered, instructed, or as it is
train     the plain model learns that, its context frozen
keep      what changed becomes a task vector, with everything that led to it
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vectors.errors import PromptTooLong
from vectors.store import Entry, Library
from workbench.data.chat import ChatFile
from workbench.engines.base import Engine
from workbench.models.catalog import Model
from workbench.models.loading import LoadedModel, load_model
from workbench.runs.process import Progress
from workbench.settings import WINDOW
from workbench.train.answers import Desk
from workbench.train.batches import Decision, check_decisions
from workbench.train.config import TrainConfig, last_name
from workbench.train.examples import Example, teach
from workbench.train.keeping import Keeper
from workbench.train.kept import Kept, Prepared
from workbench.train.lesson import Lesson
from workbench.train.loop import StepRecord, TrainResult, train
from workbench.train.replay import write_replay
from workbench.train.sources import Source
from workbench.train.stored import StoredWeights
from workbench.train.tiers import Choice, choose_tier, free_memory
from workbench.train.window import vocabulary_of, window_of

__all__ = ["Baked", "bake"]


@dataclass(frozen=True)
class Baked:
    """A task vector in the library, and how it came to be.

    `decisions` are those learnt of the data, `replay` those of general text beside them.
    `last` are the last step's weights, kept beside those of a better one.
    `kept` are the files that a resumed run goes on from; whoever has measured drops them.
    `exam` are the held-out decisions that are to be learnt, as examples with their teacher's
    contexts; `tier` says which tier was taken and why, `steps` which step's weights these are.
    """

    entry: Entry
    last: Entry | None
    changed_share: float
    decisions: int
    replay: int
    held_out: list[dict[str, float | None]]
    times: dict[str, float]
    exam: list[Example]
    tier: dict[str, Any]
    steps: dict[str, Any]
    kept: Kept


def bake(
    info: Model,
    library: Library,
    engine: Callable[[], Engine],
    source: Source,
    *,
    name: str,
    prompts: int,
    tokens: int,
    config: TrainConfig,
    progress: Progress,
    provenance: dict[str, Any],
    parents: Sequence[str] = (),
    replay: ChatFile | None = None,
) -> Baked:
    """Train what `source` gives into the model and keep the task vector as `name`.

    Args:
        info: the base on the disk.
        engine: gives what writes the decisions; it goes on serving meanwhile.
        prompts: how many decisions the engine writes, for sources that let it write.
        tokens: longest such decision.
        parents: digests that the task vector comes from.
        replay: the person's own general text, instead of the built-in prompts.

    Raises:
        RunFailed: the engine wrote nothing that can be learnt.
        InputError, PromptTooLong: a decision that cannot be learnt, by its line.
    """
    times: dict[str, float] = {}
    clock = time.monotonic()
    progress(0.0, "loading the model")
    loaded = load_model(info)
    stored = StoredWeights(info, loaded.model)
    base = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}

    kept = Kept.of(progress.folder, name)
    prepared = kept.load()
    if prepared is None:
        desk = Desk(engine, info, loaded.tokenizer, config, prompts, tokens)
        prepared = kept.save(_prepare(loaded, desk, source, replay, times, progress))
        clock = time.monotonic()
    plan = prepared.plan
    progress.event(kind="tier", tier=plan["tier"], why=plan["why"])
    progress(0.5, f"tier {plan['tier']}: {plan['why']}")
    # The pick is the run's: resumed on a machine with other memory it stays what it was.
    config = config.model_copy(update={"tier": plan["tier"]})
    result = _train(loaded.model, prepared, config, progress.part(0.5, 0.95), kept, base, stored)
    times["training"], clock = time.monotonic() - clock, time.monotonic()

    progress(0.96, "keeping the task vector")
    decisions = prepared.learnt.decisions
    general = sum(decision.kind == "replay" for decision in decisions)
    keeper = Keeper(
        library,
        info,
        stored,
        base,
        config.seed,
        about={
            **plan["about"],
            "decisions": len(decisions) - general,
            "replay": general,
            "tokens": tokens,
            "config": config.model_dump(),
            "tier": {"tier": plan["tier"], "why": plan["why"]},
            "steps": result.steps,
            **provenance,
        },
        files={
            "decisions.json": _as_json(decisions),
            **{file: text.encode() for file, text in plan["files"].items()},
        },
        parents=parents,
    )
    last = None
    if result.last_weights:
        last, _ = keeper.keep(last_name(name), result.last_weights, result.steps)
    entry, share = keeper.keep(name, result.weights, result.kept_step)
    times["keeping"] = time.monotonic() - clock
    losses = [
        {"steered": x.steered, "general": x.general}
        for x in (result.before, result.after)
        if x is not None
    ]
    return Baked(
        entry,
        last,
        share,
        len(decisions) - general,
        general,
        losses,
        times,
        _exam(prepared),
        {"tier": plan["tier"], "why": plan["why"]},
        {"steps": result.steps, "kept_step": result.kept_step, "keep": config.keep},
        kept,
    )


def _prepare(
    loaded: LoadedModel,
    desk: Desk,
    source: Source,
    replay: ChatFile | None,
    times: dict[str, float],
    progress: Progress,
) -> Prepared:
    clock = time.monotonic()
    model: Any = loaded.model
    written = source.write(desk, progress.part(0.01, 0.29))
    # A person's own line that cannot be learnt is told before the engine writes replay.
    own = [*written.learnt, *written.held_out]
    for decisions in ([e.decision for e in own], [e.read_by_teacher for e in own]):
        check_decisions(decisions, window_of(model), vocabulary_of(model))
    _check_measurable(written.held_out, desk.engine().window)
    general, spare = write_replay(desk, written.asked, replay, progress.part(0.29, 0.35))
    check_decisions([e.decision for e in general + spare], window_of(model), vocabulary_of(model))
    times["decisions"], clock = time.monotonic() - clock, time.monotonic()
    learnt, held_out = [*written.learnt, *general], [*written.held_out, *spare]
    soft = teach(
        model,
        [*learnt, *held_out],
        source.additions,
        desk.config.top_k,
        progress.part(0.35, 0.5),
    )
    times["targets"] = time.monotonic() - clock
    choice = _tier(model, desk.config, [example.decision for example in learnt])
    plan = {
        "tier": choice.tier,
        "why": choice.why,
        "about": source.about,
        "files": written.files,
        "instructed": [example.instructed_ids for example in held_out],
    }
    return Prepared(
        Lesson([e.decision for e in learnt], soft[: len(learnt)]),
        Lesson([e.decision for e in held_out], soft[len(learnt) :]),
        plan,
    )


def _check_measurable(held_out: Sequence[Example], window: int) -> None:
    """Refuse what the engine could not measure after hours of training: one position stays free."""
    for example in held_out:
        for decision in (example.decision, example.read_by_teacher):
            length = len(decision.context_ids) + len(decision.decision_ids)
            if length >= window:
                raise PromptTooLong(
                    f"The held-out decision of line {decision.line} has {length} tokens, and the "
                    f"engine that measures it has {window}, one of them free; stop it and set {WINDOW} "
                    f"to {length + 1} or more before it starts again, or shorten the line."
                )


def _tier(model: Any, config: TrainConfig, decisions: Sequence[Decision]) -> Choice:
    if config.tier != "auto":
        return Choice(config.tier, "as it was asked for")
    if config.reuse != "off":
        return Choice(2, "contexts are to be reused, which needs them frozen")
    if config.recorded:
        return Choice(2, "steps are to be recorded, which needs contexts frozen")
    return choose_tier(model, decisions, config.rows, free_memory(model.device))


def _exam(prepared: Prepared) -> list[Example]:
    """The held-out decisions with their teachers' contexts, without replay."""
    rows = zip(prepared.held_out.decisions, prepared.plan["instructed"], strict=True)
    return [
        Example(decision, instructed_ids=None if ids is None else tuple(ids))
        for decision, ids in rows
        if decision.kind == "steered"
    ]


def _train(
    model: Any,
    prepared: Prepared,
    config: TrainConfig,
    progress: Progress,
    kept: Kept,
    base: dict[str, Tensor],
    stored: StoredWeights,
) -> TrainResult:
    def on_step(record: StepRecord) -> None:
        progress.event(
            kind="step",
            step=record.step,
            steps=record.steps,
            loss=record.loss,
            gradient_norm=record.grad_norm,
            learning_rate=record.learning_rate,
            tokens_per_second=record.tokens / max(record.seconds, 1e-9),
            memory=record.memory,
        )
        if record.contexts is not None:
            progress.event(kind="contexts", step=record.step, **asdict(record.contexts))
        if record.held_out is not None:
            progress.event(
                kind="held_out",
                step=record.step,
                loss=record.held_out.steered,
                general=record.held_out.general,
                changed_share=_changed_share(model, base, stored),
            )
        progress(
            record.step / record.steps,
            f"training, step {record.step} of {record.steps}, loss {record.loss:.3f}",
        )

    return train(
        model,
        prepared.learnt.decisions,
        prepared.learnt.targets,
        config,
        held_out=prepared.held_out if prepared.held_out.decisions else None,
        on_step=on_step,
        cancelled=progress.cancelled,
        checkpoint=kept.checkpoint,
        contexts=kept.contexts,
    )


@torch.no_grad()
def _changed_share(model: Any, base: dict[str, Tensor], stored: StoredWeights) -> float:
    """Share of weights that the checkpoint's dtypes, rounded to nearest, already tell apart."""
    changed = total = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            dtype = stored.dtype(name)
            changed += int((parameter.to(dtype) != base[name].to(dtype)).sum())
            total += parameter.numel()
    return changed / total


def _as_json(decisions: Sequence[Decision]) -> bytes:
    rows = [[list(d.context_ids), list(d.decision_ids), d.kind] for d in decisions]
    return json.dumps(rows, separators=(",", ":")).encode()
