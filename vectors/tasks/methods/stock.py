"""Model stock: how far the mean of several fine-tunes should go from the base, by their angles."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from vectors.tasks.methods.tsv import average
from vectors.tasks.parameters import Scaled
from vectors.tasks.stack import Stack

__all__ = ["StockParameters", "merge"]


class StockParameters(Scaled):
    """Model stock has its scale and nothing else."""


def merge(stack: Stack, options: StockParameters) -> Tensor:
    """Return `scale * t * mean_i(w_i d_i)` with `t = N c / (1 + (N - 1) c)`.

    `c` is the mean cosine between the terms' `w_i d_i` in this tensor, at least 0: at 0 nothing is
    shared, and the tensor stays at the base.

    Source: Jang et al., "Model Stock" (arXiv:2403.19522).
    """
    flat = [x.double().reshape(-1) for x in stack.weighted()]
    norms = [x.norm() for x in flat]
    cosines = [
        float(flat[i] @ flat[j] / (norms[i] * norms[j])) if norms[i] * norms[j] > 0 else 0.0
        for i, j in combinations(range(len(flat)), 2)
    ]
    cosine = min(1.0, max(0.0, sum(cosines) / len(cosines)))
    count = len(flat)
    ratio = count * cosine / (1 + (count - 1) * cosine)
    return torch.mul(average(stack), ratio * options.scale)
