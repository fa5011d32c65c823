"""Task arithmetic: the weighted sum."""

from __future__ import annotations

from torch import Tensor

from vectors.tasks.parameters import Parameters
from vectors.tasks.stack import Stack

__all__ = ["LinearParameters", "merge"]


class LinearParameters(Parameters):
    """Task arithmetic has its weights and nothing else."""


def merge(stack: Stack, options: LinearParameters) -> Tensor:
    """Return `sum_i weight_i * delta_i`.

    Source: Ilharco et al., "Editing Models with Task Arithmetic" (arXiv:2212.04089), section 2.
    """
    merged = stack.zeros()
    for value in stack.weighted():
        merged += value
    return merged
