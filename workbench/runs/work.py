"""What each kind of run does: from its parameters to its result, both plain JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vectors.errors import Cancelled, InputError, NameNotFound, RunFailed
from vectors.steering.controls import random_like
from vectors.store import Entry
from vectors.types import Method, SteeringVector
from workbench.compare.compare import compare
from workbench.data.contrast import ContrastPair, ContrastSet, parse_contrast
from workbench.engines.base import Engine
from workbench.engines.vllm.client import VllmEngine
from workbench.extract.extract import extract
from workbench.extract.readers import EngineReader, ModelReader, Reader
from workbench.models.catalog import Model
from workbench.models.loading import load_model, load_tokenizer
from workbench.runs.process import Progress
from workbench.service import EngineStatus, Workbench
from workbench.settings import Home
from workbench.train.bake import Baked, bake
from workbench.train.config import TrainConfig
from workbench.train.sources import VectorSource
from workbench.verify.measure import Bench, read_prompts
from workbench.verify.verify import DOSES, Verdict, verify

__all__ = ["baked_json", "config_of", "do", "instruction_for"]

NEUTRAL = 12
INSTRUCTIONS = {
    "cheerful": "Answer in a cheerful, warm and upbeat way.",
    "formal": "Answer in a formal register, in complete sentences and without contractions.",
    "brief": "Answer as briefly as possible.",
    "accepts-direction": "When the user gives a direction, accept it and carry it out at once.",
}

Parameters = dict[str, Any]


def do(kind: str, parameters: Parameters, home: Home, progress: Progress) -> dict[str, Any]:
    """Do a run of `kind`.

    Raises:
        InputError: there is no such kind.
        WorkbenchError: whatever the work itself raises.
    """
    from workbench.runs.bisect import bisect_run  # noqa: PLC0415  # only where asked for
    from workbench.runs.demo import demo  # noqa: PLC0415  # demo uses this module's functions
    from workbench.runs.gradients import gradients_run  # noqa: PLC0415  # only where asked for
    from workbench.runs.learn import learn_run  # noqa: PLC0415  # uses this module's, too
    from workbench.runs.search import search_run  # noqa: PLC0415  # only where asked for

    works = {
        "extract": extract_run,
        "verify": verify_run,
        "train": train_run,
        "learn": learn_run,
        "compare": compare_run,
        "gradients": gradients_run,
        "search": search_run,
        "bisect": bisect_run,
        "demo": demo,
    }
    if kind not in works:
        raise InputError(f"There is no kind of run called '{kind}'; use {', '.join(works)}.")
    engine = parameters.get("engine", "vllm")
    with Workbench(home.root, parameters["model"], engine) as workbench:
        return works[kind](workbench, parameters, progress)


def extract_run(workbench: Workbench, p: Parameters, progress: Progress) -> dict[str, Any]:
    """Extract a vector and keep it."""
    contrast = workbench.contrast.get(p["contrast"])
    info = workbench.model(progress.part(0, 0.1))
    found = extract(
        reader_of(workbench, info, p["reader"], progress),
        contrast,
        method=Method(p["method"]),
        position=p["position"],
        report=progress.part(0.15, 0.98),
    )
    summary = found.summary()
    entry = workbench.library.save_vector(
        p["name"],
        found.vector,
        files={
            "contrast.jsonl": found.contrast.to_jsonl().encode(),
            "diagnostics.json": json.dumps(summary["blocks"]).encode(),
        },
    )
    return {"name": entry.name, "digest": entry.digest, "revision": entry.revision, **summary}


def reader_of(workbench: Workbench, info: Model, where: str, progress: Progress) -> Reader:
    """The model in this process, or the engine that serves it.

    Raises:
        InputError: an engine that does not capture.
    """
    if where == "model":
        progress(0.1, "loading the model")
        return ModelReader(load_model(info))
    engine = engine_of(workbench, progress.part(0.05, 0.15))
    if not isinstance(engine, VllmEngine):
        raise InputError(
            "Only vLLM reads activations in the engine; leave --reader or --engine out."
        )
    return EngineReader(engine, info, load_tokenizer(info), progress.cancelled)


def engine_of(workbench: Workbench, progress: Progress) -> Engine:
    """The engine, its start shown as the run's words."""

    def watch(status: EngineStatus) -> None:
        if status.state == "starting":
            progress(0.0, f"starting the engine: {status.stage}, {status.seconds:.0f} s")

    try:
        return workbench.engine(watch, progress.cancelled)
    except Cancelled:
        workbench.stop_engine()
        raise


def vector_of(workbench: Workbench, ref: str) -> tuple[Entry, SteeringVector, ContrastSet]:
    """A vector with the contrast set that it was read from."""
    entry, vector = workbench.library.load_vector(ref)
    try:
        raw = workbench.library.read_file(entry, "contrast.jsonl")
    except NameNotFound as error:
        raise RunFailed(
            f"The vector '{ref}' carries no contrast set to measure it on; extract it here."
        ) from error
    name = entry.info.get("contrast", {}).get("name", entry.name)
    return entry, vector, parse_contrast(name, raw)


def bench_of(
    workbench: Workbench, pairs: Sequence[ContrastPair], engine: Engine, progress: Progress
) -> Bench:
    """What to measure on."""
    neutral = read_prompts("neutral")[:NEUTRAL]
    tokenizer = load_tokenizer(workbench.model())
    return Bench(engine, tokenizer, pairs, neutral, progress.cancelled)


def verify_run(workbench: Workbench, p: Parameters, progress: Progress) -> dict[str, Any]:
    """Measure a vector with its controls and store the verdict."""
    entry, vector, contrast = vector_of(workbench, p["vector"])
    engine = engine_of(workbench, progress)
    bench = bench_of(workbench, contrast.held_out, engine, progress)
    with workbench.library.lease(entry.digest, "a verification"):
        verdict = _verdict(workbench, p, progress, entry, vector, contrast, bench)
    progress.check()
    result = verdict.to_json()
    workbench.library.attest(entry.digest, "verdict", result)
    return result


def _verdict(
    workbench: Workbench,
    p: Parameters,
    progress: Progress,
    entry: Entry,
    vector: SteeringVector,
    contrast: ContrastSet,
    bench: Bench,
) -> Verdict:
    return verify(
        bench,
        workbench.library,
        vector,
        name=p["vector"],
        digest=entry.digest,
        instruction=instruction_for(contrast, entry),
        doses=tuple(p.get("doses") or DOSES),
        controls=p["controls"],
        seed=p["seed"],
        report=progress,
        note=progress.event,
    )


def instruction_for(contrast: ContrastSet, entry: Entry) -> str:
    """The system prompt that simply asks for the behaviour: the baseline to beat.

    Where the set was of instructions it is the person's own, which extraction has noted.
    """
    if instruction := entry.info.get("contrast", {}).get("instruction", ""):
        return str(instruction)
    example = contrast.train[0]
    return INSTRUCTIONS.get(
        contrast.name,
        f"Answer in the manner of this example, whatever the topic: {example.positive[:300]}",
    )


def train_run(workbench: Workbench, p: Parameters, progress: Progress) -> dict[str, Any]:
    """Train a vector in, keep the task vector, and measure what was recovered."""
    entry, vector, contrast = vector_of(workbench, p["vector"])
    dose = p.get("dose") or working_dose(workbench, entry)
    if p.get("random_direction"):
        vector = random_like(vector, 77_000 + p["seed"])
        digest = workbench.library.put_vector(vector)
    else:
        digest = entry.digest
    engine = engine_of(workbench, progress)
    bench = bench_of(workbench, contrast.held_out, engine, progress)
    bench.check()
    with workbench.library.lease(entry.digest, "a training run"):
        baked = bake(
            workbench.model(),
            workbench.library,
            lambda: engine,
            VectorSource(vector, digest, dose, contrast.train, p["read_pairs"]),
            name=p["name"],
            prompts=p["prompts"],
            tokens=p["tokens"],
            config=config_of(p),
            progress=progress.part(0.02, 0.9),
            provenance={"parameters": p, "contrast": entry.info.get("contrast", {})},
            parents=[entry.digest],
        )
    progress(0.9, "measuring what was recovered")
    # A run that was resumed has learnt what it began with, whatever verdict has come since.
    learnt = baked.entry.info
    dose = float(learnt["dose"])
    measured_by = entry.digest if p.get("random_direction") else learnt["vector"]
    steered = f"{measured_by}={dose!r}"
    measured = compare(
        bench,
        steer=steered,
        trained=workbench.weights(f"{p['name']}=1"),
        prompts=[],
        report=progress.part(0.92, 0.99),
    )
    result = {
        **baked_json(baked),
        "vector": p["vector"],
        "dose": dose,
        "optimizer": p["optimizer"],
        "recovered": measured.recovered,
        "margin": measured.margin,
        "kl": measured.kl,
    }
    progress.check()
    workbench.library.attest(baked.entry.digest, "evaluation", result)
    baked.kept.drop()
    return result


def config_of(p: Parameters) -> TrainConfig:
    """The settings of training that a run's parameters ask for."""
    named = {name: p[name] for name in TrainConfig.model_fields if name in p}
    return TrainConfig.parse({**named, "loss": p["targets"]})


def baked_json(baked: Baked) -> dict[str, Any]:
    """What every training says of its task vector."""
    return {
        "name": baked.entry.name,
        "digest": baked.entry.digest,
        "revision": baked.entry.revision,
        "held_out_loss": baked.held_out,
        "changed_share": baked.changed_share,
        "decisions": baked.decisions,
        "replay": baked.replay,
        "tier": baked.tier,
        "steps": baked.steps,
        "last": None if baked.last is None else f"{baked.last.name}@{baked.last.revision}",
        "times": baked.times,
        "seconds": sum(baked.times.values()),
    }


def working_dose(workbench: Workbench, entry: Entry) -> float:
    """The working dose of the newest verdict that measured one, or the suggested dose.

    A verdict on the opposite direction alone, or on none, has no dose to work with.
    """
    for verdict in reversed(workbench.library.attestations(entry.digest, "verdict")):
        if (dose := float(verdict["working_dose"])) > 0:
            return dose
    return float(entry.info.get("suggested_dose", 0.2))


def compare_run(workbench: Workbench, p: Parameters, progress: Progress) -> dict[str, Any]:
    """Base, steered and trained side by side."""
    entry, _, contrast = vector_of(workbench, p["vector"])
    dose = p.get("dose") or working_dose(workbench, entry)
    engine = engine_of(workbench, progress)
    bench = bench_of(workbench, contrast.held_out, engine, progress)
    prompts = p.get("prompts") or [pair.prompt for pair in contrast.held_out[:4]]
    found = compare(
        bench,
        steer=f"{entry.digest}={dose!r}",
        trained=workbench.weights(f"{p['task']}=1"),
        prompts=prompts,
        max_tokens=p["max_tokens"],
        temperature=p["temperature"],
        seed=p["seed"],
        report=progress,
    )
    progress.check()
    return {"vector": p["vector"], "task": p["task"], "dose": dose, **found.to_json()}
