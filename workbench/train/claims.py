"""What is said of the gradient of decisions, beside what was measured: each claim can fail.

The claims are derivations or expectations, some for one layer only. A claim holds, does not hold,
or cannot be told of the model in hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Claim", "claims", "layer_table"]

CONTEXT_TOO = ("k_proj", "v_proj")
DECISION_ONLY = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GDN_SHARE = 0.75
NEAR = 0.1
"""How far a share may be from the one that is claimed."""
ONE_DIRECTION = 0.5
"""Cosine from which on two changes are called one direction, unless the states agree as much."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """What is said, what was measured, and whether that agrees; None where it cannot be told."""

    says: str
    measured: str
    holds: bool | None


def claims(result: Row) -> list[dict[str, Any]]:
    """Judge a result of `workbench.runs.gradients`: the flow, memory, decays and states."""
    found = [
        _table(result["weights"]),
        _memory(result["memory"]),
        _share(result["shares"]),
        _decay(result["decay"], result["states"]),
        _direction(result["states"]),
    ]
    return [asdict(claim) for claim in found]


def layer_table(weights: Sequence[Row]) -> list[dict[str, Any]]:
    """For each attention layer, the share of every matrix' gradient that context positions gave.

    `context / (context + decision)`, of norms: 0 is nothing at all, as exactly as floats say it.
    """
    attention = {w["layer"] for w in weights if w["kind"] == "attention"}
    rows: dict[int, dict[str, Any]] = {}
    for weight in weights:
        name = weight["name"].removesuffix(".weight").rsplit(".", 1)[-1]
        known = name in CONTEXT_TOO + DECISION_ONLY and weight["context"] is not None
        if known and weight["layer"] in attention:
            total = weight["context"] + weight["decision"]
            share = weight["context"] / total if total else 0.0
            rows.setdefault(weight["layer"], {"layer": weight["layer"]})[name] = share
    return [rows[layer] for layer in sorted(rows)]


def _table(weights: Sequence[Row]) -> Claim:
    says = (
        "Context positions give gradient to the key and value matrices only, and none to query, "
        "output and MLP matrices (derived for one layer)."
    )
    table = layer_table(weights)
    if not table:
        return Claim(says, "The model has no attention layers with these matrices.", None)
    agree = [
        row["layer"]
        for row in table
        if all(row.get(name, 1.0) > 0 for name in CONTEXT_TOO)
        and all(row.get(name, 0.0) == 0 for name in DECISION_ONLY)
    ]
    where = ", ".join(map(str, agree)) or "none"
    worst = max(
        ((row[name], name, row["layer"]) for row in table for name in DECISION_ONLY if name in row),
        default=(0.0, "", 0),
    )
    measured = f"True of {len(agree)} of {len(table)} attention layers ({where})."
    if worst[0] > 0:
        measured += (
            f" At most, {worst[1]} of layer {worst[2]} takes {worst[0]:.0%} from the context."
        )
    return Claim(says, measured, len(agree) == len(table))


def _memory(memory: Mapping[str, int]) -> Claim:
    says = "Freezing the context saves the memory of its activations."
    whole, frozen = memory["1"], memory["2"]
    measured = f"The peak of one pass, reading the context included, is {whole / frozen:.2f} times smaller."
    return Claim(says, measured, frozen < whole)


def _share(shares: Mapping[str, Mapping[str, float]]) -> Claim:
    says = "About 75% of the gradient flows through recurrent layers."
    layers = shares["layers"]["gdn"]
    if not 0 < layers < 1:
        return Claim(says, "The model has only one kind of layer.", None)
    whole, frozen = shares["whole"]["gdn"], shares["frozen"]["gdn"]
    measured = (
        f"{whole:.0%} of the squared norm of the mixers' gradient, {frozen:.0%} with the context "
        f"frozen; they are {layers:.0%} of the layers and hold "
        f"{shares['parameters']['gdn']:.0%} of the mixers' parameters."
    )
    return Claim(says, measured, all(abs(x - GDN_SHARE) <= NEAR for x in (whole, frozen)))


def _decay(decay: Sequence[Row], states: Sequence[Row]) -> Claim:
    says = "Training makes the heads that matter forget more slowly: their A_log falls."
    logs = [row["heads"] for row in decay if row["name"].endswith("A_log")]
    if not logs or len(logs) != len(states):
        return Claim(says, "Name a task of a model with recurrent layers.", None)
    heads = [
        (change, moved)
        for row, state in zip(logs, states, strict=True)
        for change, moved in zip(row, state["heads"], strict=True)
    ]
    heads.sort(key=lambda head: head[1])
    half = len(heads) // 2
    if not half or all(change == 0 for change, _ in heads):
        return Claim(says, "A_log has not moved.", False)
    others = sum(change for change, _ in heads[:half]) / half
    relevant = sum(change for change, _ in heads[-half:]) / half
    slower = sum(change < 0 for change, _ in heads[-half:])
    measured = (
        f"Of the {half} heads whose states moved most, {slower} forget more slowly; the mean change "
        f"of A_log is {relevant:+.2e} there and {others:+.2e} in the other half."
    )
    return Claim(says, measured, relevant < min(0.0, others))


def _direction(states: Sequence[Row]) -> Claim:
    says = "The states after training are moved along one direction, whatever the context."
    known = [row for row in states if row["shared"] is not None]
    if not known:
        return Claim(says, "Name a task of a model with recurrent layers, and more contexts.", None)
    agree = [row["layer"] for row in known if row["shared"] > max(ONE_DIRECTION, row["control"])]
    mean = sum(row["shared"] for row in known) / len(known)
    control = sum(row["control"] for row in known) / len(known)
    measured = (
        f"True of {len(agree)} of {len(known)} recurrent layers. The mean cosine between the changes "
        f"of two contexts' states is {mean:.2f}, and {control:.2f} between the states themselves."
    )
    return Claim(says, measured, len(agree) == len(known))
