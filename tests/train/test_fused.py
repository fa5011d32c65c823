"""Compiled parts: the same loss and gradients, one compilation for all layers, and no trace left."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from transformers.models.qwen3_5 import modeling_qwen3_5

from workbench.train import kernels
from workbench.train.frozen import FrozenContext, freeze_context
from workbench.train.fused import fused
from workbench.train.kernels import read_by_kernels

P, T = 11, 6
CONTEXTS = torch.tensor([P, 4])
DECISIONS = torch.tensor([4, T])


@pytest.fixture(autouse=True)
def _own_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_qwen3_5, kernels.RULE, getattr(modeling_qwen3_5, kernels.RULE))


def context_of(model: Any) -> FrozenContext:
    ids_BP = torch.randint(0, 128, (2, P), generator=torch.Generator().manual_seed(1))
    return freeze_context(model, ids_BP, torch.arange(P) >= P - CONTEXTS[:, None])


def learn(model: Any, context: FrozenContext) -> tuple[Tensor, dict[str, Tensor]]:
    ids_BT = torch.randint(0, 128, (2, T), generator=torch.Generator().manual_seed(2))
    mask_BT = torch.arange(T) < DECISIONS[:, None]
    logits_BTV = context.forward(ids_BT, mask_BT)
    loss = F.cross_entropy(logits_BTV[mask_BT], ids_BT.roll(-1, 1)[mask_BT])
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), found


@pytest.mark.parametrize("traced", [False, True])
def test_loss_and_gradients_are_those_of_transformers(model, traced: bool) -> None:
    # Random weights in the parts that a fresh model has as ones and zeros.
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    context = context_of(model)
    true_loss, true = learn(model, context)
    counter = CompileCounterWithBackend("aot_eager")
    made: list[Any] = []

    @cache
    def compiled(function: Any) -> Any:
        made.append(function)
        return torch.compile(function, backend=counter, dynamic=False) if traced else function

    torch.compiler.reset()
    with fused(model, compiled):
        loss, found = learn(model, read_by_kernels(context))
    hybrid = "qwen3_5" in model.config.model_type
    assert len(made) == (5 if hybrid else 3), made
    if traced:
        # Norms come in two widths in a hybrid; otherwise each part is compiled once for all layers.
        assert counter.frame_count <= (10 if hybrid else 3)
    assert torch.allclose(loss, true_loss, atol=1e-5)
    assert found.keys() == true.keys()
    for name, gradient in true.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
    again, _ = learn(model, context)
    assert torch.equal(again, true_loss)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_context_that_is_being_read_takes_transformers_way(hybrid) -> None:
    plain = context_of(hybrid)
    with fused(hybrid, lambda function: function):
        again = context_of(hybrid)
    for own, other in zip(plain.cache.rows([P, 4]), again.cache.rows([P, 4]), strict=True):
        assert all(torch.allclose(own[name], other[name], atol=1e-6) for name in own)
