"""The low-rank part of a change, as the two factors that a LoRA has, and what is lost by it.

Shape letters: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, sqrt

import torch
from torch import Tensor

from vectors.errors import InputError, ShapeMismatch

__all__ = ["LowRank", "low_rank"]

SPARE = 10  # more columns than asked for, so that the last ones asked for are right as well
ROUNDS = 4


@dataclass(frozen=True)
class LowRank:
    """`delta ~ up @ down`, as PEFT's `lora_B @ lora_A` at a scaling of 1.

    Args:
        up_OR: fp32, `u * sqrt(s)`.
        down_RI: fp32, `sqrt(s) * v^T`.
        error: `|delta - up @ down| / |delta|` in Frobenius norms, of the factors as they are here;
            0 for a delta of 0.
        least: the smallest error that any factors of this rank can have, up to the accuracy with
            which the singular values are known.
    """

    up_OR: Tensor
    down_RI: Tensor
    error: float
    least: float

    @property
    def rank(self) -> int:
        """R, at most what was asked for."""
        return self.down_RI.shape[0]


def low_rank(
    delta_OI: Tensor, *, rank: int | None = None, error: float | None = None, seed: int = 0
) -> LowRank:
    """Return the leading part of a matrix by a randomised singular value decomposition.

    `rank` gives that many triplets; `error` as many as it takes to lose no more than that share of
    the Frobenius norm; both, the fewer of the two, so look at the error that is returned.

    Source: Halko, Martinsson, Tropp, "Finding structure with randomness" (arXiv:0909.4061),
    algorithms 4.4 and 5.1.

    Args:
        delta_OI: fp32, outputs first, as a linear layer has its weight.
        seed: of the random start; the same inputs give the same factors.

    Raises:
        InputError: neither rank nor error, one out of bounds, or values that are not finite.
        ShapeMismatch: not a matrix.
    """
    if delta_OI.dim() != 2 or not delta_OI.numel():
        raise ShapeMismatch(
            f"Only matrices have low-rank factors, and this tensor is {list(delta_OI.shape)}; "
            "leave it out of the LoRA, and say so."
        )
    full = min(delta_OI.shape)
    if rank is None and error is None:
        raise InputError("Say which rank the factors may have, or which error; rank 16 is common.")
    if rank is not None and not rank >= 1:
        raise InputError(f"The rank must be at least 1, not {rank}; try 16.")
    if error is not None and not (isfinite(error) and 0 <= error < 1):
        raise InputError(f"The error must be at least 0 and below 1, not {error}; try 0.1.")
    whole = delta_OI.detach().double()
    square = float((whole**2).sum())
    if not isfinite(square):
        raise InputError("The delta has values that are not finite; train the task vector again.")
    most = full if rank is None else min(rank, full)
    sought = most if error is None else min(most, 32)
    while True:
        u_OR, s_R, v_IR = _leading(whole, sought, seed)
        kept = _enough(s_R, square, error)
        if kept is not None or sought == most:
            break
        sought = min(most, 2 * sought)  # the error was not reached: look at more triplets
    count = len(s_R) if kept is None else kept
    root_R = s_R[:count].sqrt()
    up_OR = (u_OR[:, :count] * root_R).float()
    down_RI = (v_IR[:, :count] * root_R).T.float().contiguous()
    lost = float((whole - up_OR.double() @ down_RI.double()).norm())
    rest = max(0.0, square - float((s_R[:count] ** 2).sum()))
    size = sqrt(square) or 1.0
    return LowRank(up_OR, down_RI, lost / size, sqrt(rest) / size)


def _enough(s_R: Tensor, square: float, error: float | None) -> int | None:
    """The fewest triplets that leave no more than `error`, None where these do not suffice."""
    if square == 0:
        return 0
    if error is None:
        return None
    rest_R = square - (s_R**2).cumsum(0)
    # fp32 factors cannot be nearer than their own rounding.
    good = (rest_R <= max(error, 1e-7) ** 2 * square).nonzero()
    return int(good[0]) + 1 if len(good) else None


def _leading(whole: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `count` singular triplets `u_OR, s_R, v_IR`, fp64."""
    width = count + SPARE
    if 2 * width >= min(whole.shape):
        u, s, vt = torch.linalg.svd(whole, full_matrices=False)
        return u[:, :count], s[:count], vt[:count].T
    rng = torch.Generator().manual_seed(seed)
    start = torch.randn(whole.shape[1], width, generator=rng, dtype=torch.float64)
    q = torch.linalg.qr(whole @ start).Q
    for _ in range(ROUNDS):
        # Orthogonal at each step, or rounding eats the small singular values.
        q = torch.linalg.qr(whole @ torch.linalg.qr(whole.T @ q).Q).Q
    u, s, vt = torch.linalg.svd(q.T @ whole, full_matrices=False)
    return (q @ u)[:, :count], s[:count], vt[:count].T
