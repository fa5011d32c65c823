"""Random projections that are made again from a seed instead of being kept."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from workbench.train.rounding import random_words

__all__ = ["key_of", "projection"]


def key_of(*parts: int) -> int:
    """Return 32 bits, as a signed number, that are a function of `parts`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little", signed=True)


def projection(
    rank: int, small: int, seed: int, epoch: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return the signs `[small, rank]`, +1 or -1 by a fair coin; `P = signs^T / sqrt(rank)`.

    `E[||P x||^2] = ||x||^2`, the Johnson-Lindenstrauss property on which APOLLO's norms rest
    (arXiv:2412.05270, section 4), holds for signs as it does for the paper's Gaussian numbers
    (Achlioptas, Database-friendly random projections, 2003), with a smaller variance. Signs are
    exact in every dtype and the same on every device.

    Row k is a function of (seed, epoch, rank, k): the signs of a shorter side are the first rows
    of those of a longer one, so that all matrices of a model share one small table.
    """
    counter_SR = torch.arange(small * rank, dtype=torch.int64, device=device)
    counter_SR = counter_SR.to(torch.int32).view(small, rank)
    words_SR = random_words(counter_SR, key_of(seed, rank), key_of(seed, epoch, 1))
    return torch.where(words_SR < 0, -1.0, 1.0).to(dtype)
