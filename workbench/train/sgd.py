"""Gradient descent on bfloat16 weights, for the comparison with optimizers that keep moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from workbench.train.rounding import random_words, round_with

__all__ = ["RoundedSgd"]


class RoundedSgd(torch.optim.Optimizer):
    """`W = round(W - lr G)`, rounded stochastically, so that small steps arrive on average; weights of
    another type than bfloat16 are not rounded.

    Args:
        parameters: the weights.
        lr: the learning rate.
        seed: with the number of the step it decides every rounding.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, seed: int = 0) -> None:
        super().__init__(list(parameters), {"lr": lr})
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Move every weight that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for number, weight in enumerate(group["params"]):
                if weight.grad is None:
                    continue
                if weight.dtype != torch.bfloat16:
                    weight.sub_(weight.grad, alpha=group["lr"])
                    continue
                taken = self.state[weight].setdefault("step", torch.zeros(()))
                taken += 1
                places = torch.arange(weight.numel(), dtype=torch.int32, device=weight.device)
                key = (self.seed * 1_000_003 + number) % (1 << 31)
                noise = random_words(places, key, int(taken)).bitwise_and_(0xFFFF)
                moved = weight.float().sub_(weight.grad.float(), alpha=group["lr"])
                weight.copy_(round_with(moved, noise.view(weight.shape)))
        return loss
