"""How many elements a density keeps, and the magnitude that parts them from the others.

Equal magnitudes share one fate, so that no order of elements, machine or sort decides. In bf16
checkpoints equal magnitudes are the rule: a tensor of 884,736 elements has some 10,000 of them.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Rank", "cut", "keep_largest", "rank_of", "share"]

Rank = Literal["share", "share-plus-one"]


def share(density: float, size: int) -> int:
    """Return `floor(density * size)`, of the decimal number as it was written.

    In floating point 0.29 * 100 is 28.999999999999996.
    """
    return int(Decimal(repr(density)) * size)


def rank_of(density: float, size: int, rank: Rank = "share") -> int:
    """Return the rank, counted from the largest as 1, of the smallest magnitude that is kept.

    "share" keeps `floor(density * size)` elements, and one at least; "share-plus-one" one more.
    """
    if rank == "share":
        return max(1, share(density, size))
    return min(size, share(density, size) + 1)


def cut(x: Tensor, rank: int) -> float:
    """Return the magnitude of that rank, counted from the largest as 1."""
    return torch.kthvalue(x.abs().reshape(-1), x.numel() - rank + 1).values.item()


def keep_largest(x: Tensor, smallest: float) -> Tensor:
    """Return `x` with 0 wherever `|x| < smallest`."""
    return torch.where(x.abs() >= smallest, x, 0.0)
