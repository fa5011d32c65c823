"""A run that trains a person's own data in: chat file, instructions, or one side of a set."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from vectors.errors import RunFailed
from workbench.compare.learnt import measure_learnt
from workbench.data.chat import parse_chats
from workbench.data.instructions import Instructed, read_instructions
from workbench.runs import work
from workbench.runs.process import Progress
from workbench.service import Workbench
from workbench.train.bake import bake
from workbench.train.data_sources import ChatSource, InstructionSource, SideSource
from workbench.train.sources import Source
from workbench.verify.measure import Bench

__all__ = ["learn_run", "source_of"]

Parameters = dict[str, Any]


def learn_run(workbench: Workbench, p: Parameters, progress: Progress) -> dict[str, Any]:
    """Train the data in, keep the task vector, and measure what is held out."""
    source = source_of(workbench, p)
    replay = parse_chats(Path(p["replay_file"]), prompts=True) if p["replay_file"] else None
    pairs = source.contrast.held_out if isinstance(source, SideSource) else ()

    @cache
    def bench() -> Bench:
        # Its engine is started when it is first needed: the data's own faults are told before.
        found = work.bench_of(workbench, pairs, work.engine_of(workbench, progress), progress)
        found.check()
        return found

    baked = bake(
        workbench.model(),
        workbench.library,
        lambda: bench().engine,
        source,
        name=p["name"],
        prompts=p["prompts"],
        tokens=p["tokens"],
        config=work.config_of(p),
        progress=progress.part(0.02, 0.9),
        provenance={
            "parameters": p,
            **({"replay_digest": replay.digest} if replay is not None else {}),
        },
        replay=replay,
    )
    progress(0.9, "measuring what was learnt")
    measured = measure_learnt(
        bench(), baked.exam, workbench.weights(f"{p['name']}=1"), progress.part(0.92, 0.99)
    )
    result = {
        **work.baked_json(baked),
        "source": source.about["source"],
        "optimizer": p["optimizer"],
        **measured.to_json(),
    }
    progress.check()
    workbench.library.attest(baked.entry.digest, "evaluation", result)
    baked.kept.drop()
    return result


def source_of(workbench: Workbench, p: Parameters) -> Source:
    """The source that the parameters name.

    Raises:
        InputError: a file that cannot be used.
        RunFailed: a set with too few pairs to hold some out.
    """
    if p["data"]:
        return ChatSource(parse_chats(Path(p["data"])))
    if p["instructions"]:
        path = Path(p["instructions"])
        return InstructionSource(read_instructions(path), origin={"file": str(path)})
    contrast = workbench.contrast.get(p["contrast"])
    origin = {"contrast": {"name": contrast.name, "digest": contrast.digest}}
    if not contrast.held_out or not contrast.train:
        raise RunFailed(f"The set '{contrast.name}' is too small to learn from and measure.")
    if contrast.by_instruction:
        learnt, held_out = [
            [
                Instructed(
                    getattr(pair, f"{p['side']}_instruction"), pair.prompt, contrast.line(pair)
                )
                for pair in pairs
            ]
            for pairs in (contrast.train, contrast.held_out)
        ]
        return InstructionSource(learnt, held_out, {**origin, "side": p["side"]})
    return SideSource(p["side"], contrast, origin)
