"""TSV-M: keep each term's leading singular vectors, and take the interference out of them.

Shape letters: M rows, N columns, R singular vectors of one term, S of all terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vectors.tasks.methods.spectra import polar, spectrum
from vectors.tasks.parameters import Scaled
from vectors.tasks.stack import Stack

__all__ = ["TsvParameters", "average", "merge"]


class TsvParameters(Scaled):
    """TSV-M has its scale and nothing else: T terms share the rank equally."""


def merge(stack: Stack, options: TsvParameters) -> Tensor:
    """Return `scale * U diag(S) V^T` of matrices, and the mean of other tensors.

    `U = polar([U_1 .. U_T])` and `V` likewise, with `U_i, S_i, V_i` the first
    `max(1, floor(min(M, N) / T))` singular triplets of `w_i d_i`. Terms that leave the matrix alone
    have no singular vectors and take no share of the rank.

    Source: Gargiulo et al., "Task Singular Vectors" (arXiv:2412.00081).
    """
    values = stack.weighted()
    if values[0].dim() != 2:
        return average(stack) * options.scale
    moved = [x_MN for x_MN in values if x_MN.count_nonzero()]
    if not moved:
        return stack.zeros()
    rank = max(1, min(moved[0].shape) // len(moved))
    parts = [spectrum(x_MN) for x_MN in moved]
    u_MS = torch.cat([u_MR[:, :rank] for u_MR, _, _ in parts], 1)
    s_S = torch.cat([s_R[:rank] for _, s_R, _ in parts])
    v_NS = torch.cat([v_NR[:, :rank] for _, _, v_NR in parts], 1)
    return (polar(u_MS) * s_S @ polar(v_NS).T * options.scale).float()


def average(stack: Stack) -> Tensor:
    """Return `sum_i w_i d_i / T`."""
    merged = stack.zeros()
    for value in stack.weighted():
        merged += value
    return merged / len(stack.deltas)
