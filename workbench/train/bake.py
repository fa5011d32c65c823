"""Train a steering vector into the weights: decisions, targets, training, task vector.

write     the steered engine answers the training prompts; the plain one the replay prompts
read      both sides of the contrast set's training pairs, as texts that nobody steered wrote
teach     the base with the vector on says what it would have said at every token
train     the plain model learns that, its context frozen
keep      what changed becomes a task vector, with everything that led to it
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vectors.errors import RunFailed
from vectors.store import Entry, Library
from vectors.types import SteeringVector
from workbench.data.contrast import ContrastPair
from workbench.data.templates import context_ids, sample
from workbench.engines.base import Engine, Message, Request, Sampling
from workbench.models.catalog import Model
from workbench.models.loading import load_model, load_tokenizer
from workbench.runs.process import Progress
from workbench.settings import package_version
from workbench.train.batches import Decision
from workbench.train.config import TrainConfig
from workbench.train.lesson import Lesson
from workbench.train.lesson_file import load_lesson, save_lesson
from workbench.train.loop import StepRecord, TrainResult, train
from workbench.train.rounding import stochastic_round
from workbench.train.teacher import targets
from workbench.verify.measure import read_prompts

__all__ = ["Baked", "bake", "write_decisions"]

CHUNK = 24
HELD_OUT_DECISIONS = 12
TEMPERATURE = 0.8


@dataclass(frozen=True)
class Baked:
    """A task vector in the library, and how it came to be."""

    entry: Entry
    changed_share: float
    decisions: int
    held_out: list[dict[str, float | None]]
    times: dict[str, float]


def bake(
    info: Model,
    library: Library,
    engine: Engine,
    vector: SteeringVector,
    *,
    name: str,
    vector_digest: str,
    dose: float,
    pairs: Sequence[ContrastPair],
    prompts: int,
    tokens: int,
    read_pairs: bool,
    config: TrainConfig,
    progress: Progress,
    provenance: dict[str, Any],
    parents: Sequence[str] = (),
) -> Baked:
    """Train `vector` at `dose`, at its best block, into the model and keep the task vector as `name`.

    Args:
        info: the base on the disk.
        engine: writes the decisions; it goes on serving meanwhile.
        pairs: training pairs, whose prompts come first among the training prompts.
        prompts: how many decisions the steered engine writes.
        tokens: length of such a decision.
        read_pairs: learn what the steered model says at each token of `pairs`, too, both sides.
        parents: digests that the task vector comes from.

    Raises:
        RunFailed: the engine wrote nothing that can be learnt.
    """
    times: dict[str, float] = {}
    clock = time.monotonic()
    progress(0.0, "loading the model")
    loaded = load_model(info)
    base: dict[str, Tensor] = {k: v.clone() for k, v in loaded.model.state_dict().items()}

    kept = _Kept.of(progress.folder, name)
    lessons = kept.lessons()
    if lessons is None:
        steer = f"{vector_digest}={dose!r}"
        learnt, held = write_decisions(
            engine, info, steer, pairs, prompts, tokens, config, progress.part(0.01, 0.35)
        )
        if read_pairs:
            learnt = [*learnt, *_texts_of(load_tokenizer(info), pairs)]
        times["decisions"], clock = time.monotonic() - clock, time.monotonic()
        additions = {vector.best_block: vector.addition(vector.best_block, dose)}
        both, cut = [*learnt, *held], len(learnt)
        soft = targets(loaded.model, both, additions, config.top_k, 8, progress.part(0.35, 0.5))
        lessons = kept.keep(Lesson(learnt, soft[:cut]), Lesson(held, soft[cut:]))
        times["targets"], clock = time.monotonic() - clock, time.monotonic()
    lesson, exam = lessons

    result = _train(loaded.model, lesson, exam, config, progress.part(0.5, 0.95), kept.checkpoint)
    times["training"], clock = time.monotonic() - clock, time.monotonic()

    progress(0.96, "keeping the task vector")
    dtype = _stored_dtype(info)
    tuned = _stored(result.weights, dtype, config.seed)
    before = {key: base[key].to(dtype) for key in tuned}
    changed = sum(int((tuned[k] != before[k]).sum()) for k in tuned)
    share = changed / sum(t.numel() for t in before.values())
    info_json = {
        "vector": vector_digest,
        "dose": dose,
        "block": vector.best_block,
        "model": info.name,
        "decisions": len(lesson.decisions),
        "tokens": tokens,
        "read_pairs": read_pairs,
        "config": config.model_dump(),
        "changed_share": share,
        "versions": {
            x: package_version(x) for x in ("torch", "transformers", "steering-workbench")
        },
        **provenance,
    }
    entry = library.save_task(
        name,
        info.base,
        before,
        tuned,
        info=info_json,
        files={"decisions.json": _as_json(lesson.decisions)},
        parents=parents,
    )
    times["keeping"] = time.monotonic() - clock
    kept.drop()
    losses = [
        {"steered": x.steered, "general": x.general}
        for x in (result.before, result.after)
        if x is not None
    ]
    return Baked(entry, share, len(lesson.decisions), losses, times)


def write_decisions(
    engine: Engine,
    info: Model,
    steer: str,
    pairs: Sequence[ContrastPair],
    prompts: int,
    tokens: int,
    config: TrainConfig,
    progress: Progress,
) -> tuple[list[Decision], list[Decision]]:
    """Return decisions to learn and held-out ones, each with its share of replay."""
    tokenizer = load_tokenizer(info)
    asked = _training_prompts(pairs, prompts + HELD_OUT_DECISIONS, config.seed)
    replayed = [row["prompt"] for row in read_prompts("replay")]
    wanted = round(len(asked) * config.replay / (1 - config.replay))
    replayed = replayed[: max(wanted, 8 if config.replay else 0)] if config.replay else []
    steered = _answers(
        engine, tokenizer, asked, steer, "steered", tokens, config.seed, progress.part(0, 0.8)
    )
    replay = _answers(
        engine, tokenizer, replayed, "", "replay", tokens, config.seed, progress.part(0.8, 1)
    )
    if len(steered) <= HELD_OUT_DECISIONS:
        raise RunFailed(
            f"The steered engine wrote only {len(steered)} usable decisions; lower the dose and try again."
        )
    few = HELD_OUT_DECISIONS if len(steered) > 4 * HELD_OUT_DECISIONS else max(1, len(steered) // 5)
    spare = max(1, len(replay) // 10) if len(replay) > 1 else 0
    learnt = [*steered[few:], *replay[spare:]]
    return learnt, [*steered[:few], *replay[:spare]]


def _training_prompts(pairs: Sequence[ContrastPair], count: int, seed: int) -> list[str]:
    """The set's own training prompts, then general ones, each once until they run out."""
    own = list(dict.fromkeys(p.prompt for p in pairs))
    general = [row["prompt"] for row in read_prompts("training") if row["prompt"] not in set(own)]
    rng = random.Random(seed)
    rng.shuffle(own)
    rng.shuffle(general)
    pool = [*own[: count // 2], *general, *own[count // 2 :]]
    chosen = [pool[i % len(pool)] for i in range(count)]
    rng.shuffle(chosen)
    return chosen


def _answers(
    engine: Engine,
    tokenizer: Any,
    prompts: Sequence[str],
    steer: str,
    kind: Any,
    tokens: int,
    seed: int,
    progress: Progress,
) -> list[Decision]:
    found: list[Decision] = []
    for start in range(0, len(prompts), CHUNK):
        progress(start / len(prompts), f"writing {kind} decisions, {start} of {len(prompts)}")
        chunk = prompts[start : start + CHUNK]
        chats: list[tuple[Message, ...]] = [({"role": "user", "content": p},) for p in chunk]
        sampling = [
            Sampling(tokens, TEMPERATURE, 1.0, seed * 100_003 + start + i)
            for i in range(len(chunk))
        ]
        requests = [Request(c, steer, sampling=s) for c, s in zip(chats, sampling, strict=True)]
        for index, reply in enumerate(engine.generate(requests, progress.cancelled)):
            ids = list(tokenizer(reply.text, add_special_tokens=False)["input_ids"])
            if reply.finish == "stop" and tokenizer.eos_token_id is not None:
                ids.append(tokenizer.eos_token_id)
            if len(ids) >= 2:
                context = context_ids(tokenizer, chats[index])
                found.append(Decision(context, tuple(ids), kind, start + index))
    return found


@dataclass(frozen=True)
class _Kept:
    """What a run keeps until its end, so that one that was killed goes on where it was."""

    lesson: Path | None
    checkpoint: Path | None

    @classmethod
    def of(cls, folder: Path | None, name: str) -> _Kept:
        # By name, because one run may train several times.
        if folder is None:
            return cls(None, None)
        files = (folder / f"{name}.{what}.safetensors" for what in ("lesson", "checkpoint"))
        return cls(*files)

    def lessons(self) -> tuple[Lesson, Lesson] | None:
        """The decisions to learn and the held-out ones, where they were written before."""
        if self.lesson is None or not self.lesson.exists():
            return None
        found = load_lesson(self.lesson)
        return found["learnt"], found["held_out"]

    def keep(self, learnt: Lesson, held_out: Lesson) -> tuple[Lesson, Lesson]:
        if self.lesson is not None:
            save_lesson(self.lesson, {"learnt": learnt, "held_out": held_out})
        return learnt, held_out

    def drop(self) -> None:
        for file in (self.lesson, self.checkpoint):
            if file is not None:
                file.unlink(missing_ok=True)


def _train(
    model: Any,
    lesson: Lesson,
    exam: Lesson,
    config: TrainConfig,
    progress: Progress,
    checkpoint: Path | None,
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
        )
        if record.held_out is not None:
            progress.event(
                kind="held_out",
                step=record.step,
                loss=record.held_out.steered,
                general=record.held_out.general,
            )
        progress(
            record.step / record.steps,
            f"training, step {record.step} of {record.steps}, loss {record.loss:.3f}",
        )

    return train(
        model,
        lesson.decisions,
        lesson.targets,
        config,
        held_out=exam,
        on_step=on_step,
        cancelled=progress.cancelled,
        checkpoint=checkpoint,
    )


def _texts_of(tokenizer: Any, pairs: Sequence[ContrastPair]) -> list[Decision]:
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


def _stored(weights: dict[str, Tensor], dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """The trained weights as the checkpoint stores them.

    Most updates are smaller than the spacing of bfloat16. Rounding to nearest would lose them, and
    with them a sixth of the effect; rounding at random keeps them on average (docs/adr/0009).
    """
    generator = torch.Generator().manual_seed(seed)
    rounded = dtype == torch.bfloat16
    return {
        key: stochastic_round(value.cpu(), generator)
        if rounded and value.dtype == torch.float32
        else value.to(dtype)
        for key, value in weights.items()
    }


def _stored_dtype(info: Model) -> torch.dtype:
    """The dtype of the checkpoint: the task vector is exact against what is on the disk."""
    from safetensors import safe_open  # noqa: PLC0415  # only here

    with safe_open(sorted(info.folder.glob("*.safetensors"))[0], "pt") as file:
        return file.get_tensor(next(iter(file.keys()))).dtype


def _as_json(decisions: Sequence[Decision]) -> bytes:
    rows = [[list(d.context_ids), list(d.decision_ids), d.kind] for d in decisions]
    return json.dumps(rows, separators=(",", ":")).encode()
