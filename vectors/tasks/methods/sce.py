"""SCE: select elements in which the terms differ, calculate weights, erase minority signs."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from vectors.tasks.parameters import Scaled
from vectors.tasks.stack import Stack
from vectors.tasks.trim import cut, rank_of

__all__ = ["SceParameters", "merge"]


class SceParameters(Scaled):
    """How much is selected."""

    density: float = Field(
        0.1,
        gt=0,
        le=1,
        description="Share of a tensor's elements that is merged, those of the largest variance "
        "across the terms.",
    )


def merge(stack: Stack, options: SceParameters) -> Tensor:
    """Return `scale * sum_i a_i c_i x_i / sum_i a_i c_i` over the selected elements.

    `x_i = w_i d_i` where the variance over `i` is among the largest, else 0; `c_i` is the mean of
    `x_i^2` over the tensor; `a_i` is 1 where `x_i` has the sign of `sum_j x_j`, else 0. The
    weights of the recipe come in through `x_i`, sign and size.

    Source: Wan et al., "FuseChat" (arXiv:2408.07990).
    """
    if not stack.deltas[0].numel():
        return stack.zeros()
    terms = [x.double() for x in stack.weighted()]
    mean = sum(terms[1:], terms[0]) / len(terms)
    spread = sum(((x - mean) ** 2 for x in terms), torch.zeros_like(mean)) / len(terms)
    smallest = cut(spread, rank_of(options.density, spread.numel()))
    terms = [torch.where(spread >= smallest, x, 0.0) for x in terms]
    sign = torch.sign(sum(terms[1:], terms[0]))
    above, below = torch.zeros_like(mean), torch.zeros_like(mean)
    for x in terms:
        weight = (x**2).mean()
        agrees = x * sign > 0
        above += torch.where(agrees, weight * x, 0.0)
        below += torch.where(agrees, weight, 0.0)
    return (torch.where(below == 0, 0.0, above / below) * options.scale).float()
