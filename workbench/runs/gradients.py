"""A run that measures where the gradient of decisions flows, and writes a report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from vectors.formats.atomic import write_atomic
from workbench.data.chat import parse_chats
from workbench.models.loading import load_model
from workbench.runs.flow_report import flow_report
from workbench.runs.process import Progress
from workbench.service import Workbench
from workbench.train.batches import Decision, check_decisions
from workbench.train.claims import claims
from workbench.train.data_sources import chat_decisions, turn_decision
from workbench.train.flow import gradient_flow
from workbench.train.states import decay_movement, read_states, state_movement
from workbench.train.window import vocabulary_of, window_of

__all__ = ["gradients_run"]

Parameters = dict[str, Any]


def gradients_run(workbench: Workbench, p: Parameters, progress: Progress) -> dict[str, Any]:
    """Measure the flow on the base and, where a task is named, what its training moved."""
    info = workbench.model()
    progress(0.0, "loading the model")
    loaded = load_model(info)
    model: Any = loaded.model
    decisions = _decisions(workbench, p, loaded.tokenizer)[: p["decisions"]]
    check_decisions(decisions, window_of(model), vocabulary_of(model))
    progress(0.1, f"measuring the gradient of {len(decisions)} decisions")
    result = {
        "model": info.name,
        "task": p["task"],
        **gradient_flow(model, decisions).to_json(),
        "decay": [],
        "states": [],
    }
    if p["task"]:
        progress(0.7, "comparing decays and states before and after training")
        contexts = [decision.context_ids for decision in decisions]
        base = {name: w.clone() for name, w in model.state_dict().items()}
        before = read_states(model, contexts)
        state = workbench.weights(f"{p['task']}=1")
        trained: Any = load_model(replace(info, folder=workbench.home.weights / state)).model
        result["decay"] = decay_movement(base, trained.state_dict())
        result["states"] = state_movement(before, read_states(trained, contexts))
    result["claims"] = claims(result)
    if progress.folder is not None:
        report = progress.folder / "report.html"
        write_atomic(report, flow_report(result).encode())
        result["report"] = str(report)
    return result


def _decisions(workbench: Workbench, p: Parameters, tokenizer: Any) -> list[Decision]:
    if p["data"]:
        file = parse_chats(Path(p["data"]))
        return [decision for _, decision in chat_decisions(tokenizer, file, "steered")]
    pairs = workbench.contrast.get(p["contrast"]).pairs
    return [
        turn_decision(tokenizer, pair.prompt, pair.positive, number)
        for number, pair in enumerate(pairs, start=1)
    ]
