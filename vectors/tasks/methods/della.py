"""DELLA: drop elements at random, the small ones more often, and rescale each by its own chance."""

from __future__ import annotations

from dataclasses import replace
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vectors.tasks.election import total
from vectors.tasks.masks import uniforms
from vectors.tasks.parameters import Electing
from vectors.tasks.stack import Stack

__all__ = ["DellaParameters", "chances", "merge"]


class DellaParameters(Electing):
    """What is dropped, and by which random numbers."""

    elect: bool = Field(
        True, description="Whether terms elect a sign as in TIES; without it they are added."
    )
    density: float = Field(0.3, gt=0, le=1, description="Mean probability that an element is kept.")
    epsilon: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="How far the probability of a row's largest element lies above the mean, and "
        "that of its smallest below it.",
    )
    seed: int = Field(
        0, ge=0, lt=2**53, description="Seed of the masks, each a function of its element alone."
    )

    @model_validator(mode="after")
    def _are_chances(self) -> Self:
        if self.density - self.epsilon <= 0 or self.density + self.epsilon > 1:
            raise ValueError(
                f"density {self.density:g} with epsilon {self.epsilon:g} gives probabilities "
                "outside 0 to 1; take a smaller epsilon"
            )
        return self


def merge(stack: Stack, options: DellaParameters) -> Tensor:
    """Return the fusion of `m_i d_i / p_i`, with `m_i` 1 where `u_i < p_i`, else 0.

    Source: Deep et al., "DELLA-Merging" (arXiv:2406.11617).
    """
    kept: list[Tensor] = []
    for key, delta in zip(stack.keys, stack.deltas, strict=True):
        chance = chances(delta, options)
        drawn = uniforms(options.seed, key, stack.name, delta.shape)
        kept.append(torch.where(drawn < chance, (delta / chance).float(), 0.0))
    return total(replace(stack, deltas=tuple(kept)), options)


def chances(delta: Tensor, options: DellaParameters) -> Tensor:
    """Return the probability that each element is kept, fp64, linear in its rank within its row.

    `density - epsilon + 2 epsilon r / (n - 1)`; equal magnitudes share the mean of their ranks.
    A row is the last dimension, the inputs of one output.
    """
    width = delta.shape[-1] if delta.dim() else 1
    if width < 2:
        return torch.full(delta.shape, options.density, dtype=torch.float64)
    size = delta.abs().reshape(-1, width).contiguous()
    rows = size.sort(dim=-1).values
    below = torch.searchsorted(rows, size)
    within = torch.searchsorted(rows, size, right=True)
    rank = (below + within - 1).double() / 2
    chance = options.density - options.epsilon + 2 * options.epsilon * rank / (width - 1)
    return chance.reshape(delta.shape)
