"""Random projections that are made again from a seed instead of being kept."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["generator_of", "projection"]


def generator_of(device: torch.device, *key: int) -> torch.Generator:
    """Return a generator whose stream is a function of `key`: there is no state to save."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


def projection(
    rank: int, small: int, key: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return `P [rank, small]` with `P_ij ~ N(0, 1) / sqrt(rank)`, the same for the same key.

    `E[||P x||^2] = ||x||^2`, the Johnson-Lindenstrauss property on which APOLLO's norms rest
    (arXiv:2412.05270, section 4).
    """
    generator = generator_of(device, *key)
    noise_RS = torch.randn(rank, small, generator=generator, device=device, dtype=dtype)
    return noise_RS.mul_(rank**-0.5)
