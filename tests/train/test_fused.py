"""Compiled parts: the same loss and gradients, one compilation for all layers, and no trace left."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from transformers.models.qwen3_5 import modeling_qwen3_5

from workbench.train import kernels
from workbench.train.factored import Factors
from workbench.train.frozen import FrozenContext, freeze_context
from workbench.train.fused import fused
from workbench.train.joined import GROUPS, JoinedWeights, products
from workbench.train.kernels import read_by_kernels

P, T = 11, 6
MLP, MLP_OUT = GROUPS[2], GROUPS[5]
CONTEXTS = torch.tensor([P, 4])
DECISIONS = torch.tensor([4, T])


@pytest.fixture(autouse=True)
def _own_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_qwen3_5, kernels.RULE, getattr(modeling_qwen3_5, kernels.RULE))


def context_of(model: Any) -> FrozenContext:
    ids_BP = torch.randint(0, 128, (2, P), generator=torch.Generator().manual_seed(1))
    return freeze_context(model, ids_BP, torch.arange(P) >= P - CONTEXTS[:, None])


def learn(
    model: Any, context: FrozenContext, joined: JoinedWeights | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    ids_BT = torch.randint(0, 128, (2, T), generator=torch.Generator().manual_seed(2))
    mask_BT = torch.arange(T) < DECISIONS[:, None]
    logits_BTV = context.forward(ids_BT, mask_BT)
    loss = F.cross_entropy(logits_BTV[mask_BT], ids_BT.roll(-1, 1)[mask_BT])
    loss.backward()
    if joined is not None:
        for parameter, gradient in joined.hand_out().items():
            parameter.grad = gradient.dense() if isinstance(gradient, Factors) else gradient
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), found


@pytest.mark.parametrize(
    ("traced", "way"),
    [(False, ""), (False, "formed"), (False, "factored"), (True, "formed"), (True, "factored")],
)
def test_loss_and_gradients_are_those_of_transformers(model, traced: bool, way: str) -> None:
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
    joined = JoinedWeights(model, model.parameters()) if way else None
    if joined is not None:
        joined.begin(2, T, joined.groups.values() if way == "factored" else ())
    with fused(model, compiled, joined):
        loss, found = learn(model, read_by_kernels(context), joined)
    hybrid = "qwen3_5" in model.config.model_type
    assert len(made) == (5 if hybrid else 3), made
    if traced:
        # Each half is compiled once for all layers of a kind.
        assert counter.frame_count <= len(made)
    assert torch.allclose(loss, true_loss, atol=1e-5)
    assert found.keys() == true.keys()
    for name, gradient in true.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
    again, _ = learn(model, context)
    assert torch.equal(again, true_loss)
    assert not any("forward" in vars(module) for module in model.modules())


def test_joined_weights_are_the_parameters(hybrid) -> None:
    before = {name: p.detach().clone() for name, p in hybrid.named_parameters()}
    first, second = (layer.mlp for layer in hybrid.model.layers[:2])
    second.up_proj.weight.requires_grad_(False)
    joined = JoinedWeights(hybrid, [p for p in hybrid.parameters() if p.requires_grad])
    assert all(torch.equal(p, before[name]) for name, p in hybrid.named_parameters())
    assert joined.way(second, MLP) is None and joined.way(second, MLP_OUT) is not None
    way = joined.way(first, MLP)
    assert way is not None and way.probe is None
    with torch.no_grad():
        first.up_proj.weight[0, 0] = 7.0
    assert way.weight[len(first.gate_proj.weight), 0] == 7.0


@pytest.mark.parametrize("factored", [False, True])
def test_gradients_of_products_are_those_of_their_matrices(hybrid, factored: bool) -> None:
    mlp = hybrid.model.layers[0].mlp
    joined = JoinedWeights(hybrid, hybrid.parameters())
    group = joined.groups[mlp, MLP]
    generator = torch.Generator().manual_seed(4)
    x, dy = (torch.randn(2, 3, n, generator=generator) for n in (64, 192))
    x.requires_grad_()
    true = torch.autograd.grad(
        torch.cat([mlp.gate_proj(x), mlp.up_proj(x)], -1), [x, *group.owned], dy
    )
    for _ in range(2):
        joined.begin(2, 3, [group] if factored else ())
        joined.keep(mlp, MLP, x.detach())
        x.grad = None
        torch.cat(products(mlp, MLP, x, joined.way(mlp, MLP)), -1).backward(dy)
        found = joined.hand_out()
        assert list(found) == group.owned
        made = [g.dense() if isinstance(g, Factors) else g for g in found.values()]
        for own, other in zip([x.grad, *made], true, strict=True):
            assert torch.allclose(own, other, atol=1e-5)
    assert all(isinstance(g, Factors) == factored for g in found.values())
    assert all(isinstance(g, Tensor) for g in joined.hand_out(lambda p: False).values())


def test_weights_that_two_modules_share_are_not_joined(llama) -> None:
    first, second, third = (layer.mlp for layer in llama.model.layers)
    second.up_proj.weight = first.up_proj.weight
    joined = JoinedWeights(llama, llama.parameters())
    assert joined.way(first, MLP) is None and joined.way(second, MLP) is None
    assert joined.way(third, MLP) is not None


def test_joined_weights_can_be_saved(llama, tmp_path) -> None:
    JoinedWeights(llama, llama.parameters())
    trained = {name: p.detach() for name, p in llama.named_parameters()}
    save_file(trained, tmp_path / "weights.safetensors")
    found = load_file(tmp_path / "weights.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in trained.items())


def test_a_context_that_is_being_read_takes_transformers_way(hybrid) -> None:
    plain = context_of(hybrid)
    with fused(hybrid, lambda function: function):
        again = context_of(hybrid)
    for own, other in zip(plain.cache.rows([P, 4]), again.cache.rows([P, 4]), strict=True):
        assert all(torch.allclose(own[name], other[name], atol=1e-6) for name in own)
