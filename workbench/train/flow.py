"""Where the gradient of a decision comes from and where it goes, weight by weight.

Shape letters: B rows, P context positions, T all positions, M x N a weight matrix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from workbench.models.blocks import decoder_blocks
from workbench.train.batches import Batch, Decision, collate
from workbench.train.memory import peak_bytes
from workbench.train.modes import training
from workbench.train.step import decision_loss

__all__ = ["Flow", "WeightFlow", "gradient_flow"]

RECURRENT = "linear_attn"


@dataclass(frozen=True)
class WeightFlow:
    """Norms of one weight's gradient, summed over the decisions.

    Args:
        layer: 0-based; None outside the layers.
        kind: "gdn", "attention", "mlp", "norm" or "other".
        context, decision: what positions of the context, and of the decision, contribute in ordinary
            training; they add up to `whole` as tensors. None where a weight is not a matrix that
            multiplies each position, so that its gradient is not taken apart.
        whole: in ordinary training. frozen: with the context frozen.
        cosine: of the whole and the frozen gradient.
    """

    name: str
    layer: int | None
    kind: str
    parameters: int
    context: float | None
    decision: float | None
    whole: float
    frozen: float
    cosine: float | None


@dataclass(frozen=True)
class Flow:
    """What was measured; `memory` is the peak of forward and backward at each tier, in bytes."""

    weights: list[WeightFlow]
    memory: dict[int, int]
    decisions: int

    def shares(self) -> dict[str, dict[str, float]]:
        """Of GDN and attention mixers: share of layers, parameters, and squared gradient norm.

        The share of layers is what indifference would give; a share of the gradient means something
        beside it only.
        """
        mixers = {"gdn": [], "attention": []}
        for weight in self.weights:
            if weight.kind in mixers:
                mixers[weight.kind].append(weight)
        measures = {
            "layers": lambda rows: len({row.layer for row in rows}),
            "parameters": lambda rows: sum(row.parameters for row in rows),
            "whole": lambda rows: sum(row.whole**2 for row in rows),
            "frozen": lambda rows: sum(row.frozen**2 for row in rows),
        }
        found = {}
        for name, measure in measures.items():
            values = {kind: measure(rows) for kind, rows in mixers.items()}
            total = sum(values.values())
            found[name] = {kind: value / total if total else 0.0 for kind, value in values.items()}
        return found

    def to_json(self) -> dict[str, Any]:
        """For storing and showing."""
        return {
            "weights": [asdict(weight) for weight in self.weights],
            "shares": self.shares(),
            "memory": {str(tier): size for tier, size in self.memory.items()},
            "decisions": self.decisions,
        }


def gradient_flow(model: PreTrainedModel, decisions: Sequence[Decision]) -> Flow:
    """Measure the gradient of the decisions' cross-entropy, ordinary and with frozen contexts.

    For a matrix that multiplies every position, `y_t = W x_t`, the gradient is a sum over positions,
    `dL/dW = sum_t (dL/dy_t) x_t^T`, and is taken apart at the last context position. The context's
    last token counts as the decision's: it predicts the first token that is learnt.

    Raises:
        ModelNotSupported: layers that cannot be found, frozen or recomputed.
    """
    model_any: Any = model
    blocks = decoder_blocks(model_any)
    places = {id(p): i for i, block in enumerate(blocks) for p in block.parameters()}
    whole: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = {}
    context: dict[str, Tensor] = {}
    for decision in decisions:
        batch = collate([decision], model.device)
        _add(whole, _gradients(model, batch, 1, context))
        _add(frozen, _gradients(model, batch, 2, {}))
    rows = []
    parameters = dict(model.named_parameters())
    for name, gradient in whole.items():
        part = context.get(name)
        rows.append(
            WeightFlow(
                name=name,
                layer=places.get(id(parameters[name])),
                kind=_kind(name, parameters[name]),
                parameters=gradient.numel(),
                context=None if part is None else part.norm().item(),
                decision=None if part is None else (gradient - part).norm().item(),
                whole=gradient.norm().item(),
                frozen=frozen[name].norm().item(),
                cosine=_cosine(gradient, frozen[name]),
            )
        )
    longest = max(decisions, key=lambda d: len(d.context_ids) + len(d.decision_ids))
    return Flow(rows, _memory(model, collate([longest], model.device)), len(decisions))


def _gradients(
    model: PreTrainedModel, batch: Batch, tier: int, context: dict[str, Tensor]
) -> dict[str, Tensor]:
    P = batch.context_ids_BP.shape[1]
    with training(model) as weights, _parts(model, P, context):
        decision_loss(model, batch, None, tier).backward()
        return {n: w.grad.float() for n, w in weights.items() if w.grad is not None}


@contextmanager
def _parts(model: nn.Module, P: int, context: dict[str, Tensor]) -> Iterator[None]:
    """Add to `context` what the first P positions contribute to each matrix' gradient."""

    def watch(name: str) -> Any:
        def forward(module: nn.Module, inputs: Any, output: Tensor) -> None:
            x_BTN = inputs[0].detach()
            # A decision alone on a frozen context has no context positions.
            if not output.requires_grad or x_BTN.dim() != 3 or x_BTN.shape[1] <= P:
                return

            def backward(dy_BTM: Tensor) -> None:
                part = torch.einsum("btm,btn->mn", dy_BTM[:, :P].float(), x_BTN[:, :P].float())
                _add(context, {name: part})

            output.register_hook(backward)

        return forward

    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    handles = [
        module.register_forward_hook(watch(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in trained
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _memory(model: PreTrainedModel, batch: Batch) -> dict[int, int]:
    found = {}
    for tier in (1, 2, 3):
        with training(model, recompute=tier == 3):
            found[tier] = peak_bytes(
                lambda tier=tier: decision_loss(model, batch, None, tier).backward()
            )
    return found


def _add(total: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    for name, tensor in more.items():
        total[name] = total[name] + tensor if name in total else tensor.clone()


def _kind(name: str, weight: Tensor) -> str:
    if RECURRENT in name:
        return "gdn"
    if re.search(r"\b(self_attn|attn|attention)\b", name):
        return "attention"
    if re.search(r"\bmlp\b|feed_forward", name):
        return "mlp"
    return "norm" if weight.dim() == 1 else "other"


def _cosine(a: Tensor, b: Tensor) -> float | None:
    size = a.norm().item() * b.norm().item()
    return (a * b).sum().item() / size if size > 0 and math.isfinite(size) else None
