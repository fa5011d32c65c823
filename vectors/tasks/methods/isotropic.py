"""Iso-C: give all directions of the summed change the same strength."""

from __future__ import annotations

from torch import Tensor

from vectors.tasks.methods.spectra import spectrum
from vectors.tasks.methods.tsv import average
from vectors.tasks.parameters import Scaled
from vectors.tasks.stack import Stack

__all__ = ["IsotropicParameters", "merge"]


class IsotropicParameters(Scaled):
    """Iso-C has its scale and nothing else; the authors tune it."""


def merge(stack: Stack, options: IsotropicParameters) -> Tensor:
    """Return `scale * mean(S) U V^T` of matrices, and the mean of other tensors.

    `U diag(S) V^T = sum_i w_i d_i`; the mean is over the singular values that are not 0.

    Source: Marczak et al., "No Task Left Behind" (arXiv:2502.04959).
    """
    if stack.deltas[0].dim() != 2:
        return average(stack) * options.scale
    merged_MN = stack.zeros()
    for value in stack.weighted():
        merged_MN += value
    if not merged_MN.count_nonzero():
        return merged_MN
    u_MR, s_R, v_NR = spectrum(merged_MN)
    return (s_R.mean() * (u_MR @ v_NR.T) * options.scale).float()
