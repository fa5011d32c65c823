"""Singular vectors, with what rounding alone made of them left out.

Shape letters: M rows, N columns, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["polar", "spectrum"]


def spectrum(x_MN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `u_MR, s_R, v_NR` with `u diag(s) v^T = x`, fp64, R the numerical rank.

    Vectors of singular values that are 0 but for rounding are arbitrary, so they are left out.
    fp64, so that the result rounded to fp32 hardly depends on the machine.
    """
    u_MR, s_R, vt_RN = torch.linalg.svd(x_MN.double(), full_matrices=False)
    # fp32 inputs carry fp32 errors, so singular values below those mean nothing.
    floor = s_R[:1] * max(x_MN.shape) * torch.finfo(torch.float32).eps / 8
    rank = int((s_R > floor).sum())
    return u_MR[:, :rank], s_R[:rank], vt_RN[:rank].T


def polar(x_MN: Tensor) -> Tensor:
    """Return `u v^T`, the nearest matrix to `x` whose non-zero singular values are 1."""
    u_MR, _, v_NR = spectrum(x_MN)
    return u_MR @ v_NR.T
