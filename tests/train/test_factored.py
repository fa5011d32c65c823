"""Gradients kept as factors: the same model, the same gradient, the same step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from workbench.train.apollo import Apollo
from workbench.train.factored import clip_grad_norm, factored_linears, factors_of, linear


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 9, bias=False), nn.Tanh(), nn.Linear(9, 3)
    ).double()


def losses(net: nn.Module, rounds: int = 2) -> None:
    """Backward twice, as two micro-batches of unequal lengths do."""
    for seed in range(rounds):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 3 + seed, 12, generator=generator, dtype=torch.float64)
        net(x).square().sum().backward()


def test_factors_are_the_gradient_and_the_rest_is_unchanged():
    plain, kept = model(), model()
    losses(plain)
    with factored_linears(kept, rank=4) as names:
        losses(kept)
    assert names == ["0.weight", "2.weight"]
    wanted = dict(plain.named_parameters())
    for name, parameter in kept.named_parameters():
        factors = factors_of(parameter)
        assert (factors is not None) == (name in names) == (parameter.grad is None)
        found = factors.dense() if factors else parameter.grad
        torch.testing.assert_close(found, wanted[name].grad, rtol=1e-12, atol=1e-12)
        if factors:
            assert factors.square().item() == pytest.approx(found.square().sum().item(), rel=1e-10)
    assert "forward" not in vars(kept[0]), "the layers are as they were"


def test_gradient_of_the_input_is_right():
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((5, 4), (3, 4), 3))
    for use in (linear, nn.functional.linear):
        (use(x, w, b) ** 2).sum().backward()
    half = x.grad.clone()
    x.grad = None
    (linear(x, w, b) ** 2).sum().backward()
    torch.testing.assert_close(2 * x.grad, half)


@pytest.mark.parametrize("most", [0.05, 1e6])
def test_steps_and_clipping_equal_those_of_formed_gradients(most):
    plain, kept = model(), model()
    nets = []
    for net in (plain, kept):
        optimizer = Apollo(net.parameters(), lr=1e-2, rank=4, refresh=2, weight_decay=0.1)
        for _ in range(4):
            if net is kept:
                with factored_linears(net, rank=4):
                    losses(net)
                norm = clip_grad_norm(net.parameters(), most)
            else:
                losses(net)
                norm = nn.utils.clip_grad_norm_(net.parameters(), most)
            optimizer.step()
            optimizer.zero_grad()
        assert all(factors_of(p) is None and p.grad is None for p in net.parameters())
        nets.append((norm, net))
    torch.testing.assert_close(nets[0][0], nets[1][0], check_dtype=False, rtol=1e-5, atol=1e-6)
    for a, b in zip(plain.parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_weight_that_an_embedding_shares_is_left_alone():
    embedding, head = nn.Embedding(12, 10), nn.Linear(10, 12, bias=False)
    head.weight = embedding.weight
    net = nn.ModuleDict({"embedding": embedding, "head": head, "free": nn.Linear(10, 12)})
    with factored_linears(net, rank=4) as names:
        assert names == ["free.weight"]


def test_a_gradient_and_factors_of_one_weight_add_up():
    weight = nn.Parameter(torch.zeros(8, 6, dtype=torch.float64))
    other = nn.Parameter(torch.zeros(8, 6, dtype=torch.float64))
    x = torch.randn(3, 6, dtype=torch.float64)
    for parameter, product in ((weight, linear), (other, nn.functional.linear)):
        (product(x, parameter).sum() + (parameter * 3).sum()).backward()
    for parameter in (weight, other):
        Apollo([parameter], lr=0.1, rank=2).step()
    torch.testing.assert_close(weight, other)
