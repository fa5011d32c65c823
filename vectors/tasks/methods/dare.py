"""DARE: drop elements at random and rescale the rest, so that the expectation stays."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from vectors.tasks.election import total
from vectors.tasks.masks import uniforms
from vectors.tasks.parameters import Electing
from vectors.tasks.stack import Stack

__all__ = ["DareParameters", "merge"]


class DareParameters(Electing):
    """What is dropped, and by which random numbers."""

    density: float = Field(
        0.1, gt=0, le=1, description="Probability that an element is kept, 1 - p in the paper."
    )
    seed: int = Field(
        0, ge=0, lt=2**53, description="Seed of the masks, each a function of its element alone."
    )


def merge(stack: Stack, options: DareParameters) -> Tensor:
    """Return `scale * sum_i w_i m_i d_i / density`, with `m_i` 1 where `u_i < density`, else 0.

    Source: Yu et al., "Language Models are Super Mario" (arXiv:2311.03099).
    """
    kept = tuple(
        torch.where(
            uniforms(options.seed, key, stack.name, delta.shape) < options.density,
            delta / options.density,
            0.0,
        )
        for key, delta in zip(stack.keys, stack.deltas, strict=True)
    )
    return total(replace(stack, deltas=kept), options)
