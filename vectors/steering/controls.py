"""Directions that should not work, to compare one with that should."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vectors.types import SteeringVector

__all__ = ["random_direction", "random_like", "shuffled_difference"]


def random_direction(width: int, seed: int) -> Tensor:
    """Return a unit direction drawn evenly from the sphere, fp32 `[D]`."""
    generator = torch.Generator().manual_seed(seed)
    v_D = torch.randn(width, generator=generator, dtype=torch.float64)
    return (v_D / v_D.norm()).float()


def random_like(vector: SteeringVector, seed: int) -> SteeringVector:
    """Return a random direction at the vector's best block, of the same norm at the same dose."""
    best = vector.best_block
    return replace(
        vector,
        directions={best: random_direction(vector.width, seed)},
        mean_norms={best: vector.mean_norms[best]},
        info={"method": "random", "seed": seed},
    )


def shuffled_difference(pos_ND: Tensor, neg_ND: Tensor, seed: int) -> Tensor:
    """Return the mean difference with each pair's sides swapped by a fair coin, unit `[D]`.

    It lies where the activations lie, unlike a random direction, and means nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    sign_N = torch.randint(0, 2, (len(pos_ND),), generator=generator).float() * 2 - 1
    v_D = ((pos_ND - neg_ND).float() * sign_N[:, None]).mean(0)
    return v_D / v_D.norm().clamp_min(1e-12)
