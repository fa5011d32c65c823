"""Rounding to bfloat16 that is right on average."""

from __future__ import annotations

import torch
from torch import Tensor

from vectors.errors import InputError

__all__ = ["stochastic_round"]


def stochastic_round(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Round float32 to bfloat16, up or down with probability in proportion to nearness.

    `P[up] = (w - down) / (up - down)`, hence `E[round(w)] = w`: an update far smaller than the
    spacing of bfloat16 still arrives on average, where rounding to nearest would lose it every
    time (Gupta et al., arXiv:1502.02551, section 3.1).

    A bfloat16 is the upper half of a float32, so that a uniform 16-bit number is added to the
    lower half and what does not carry is cut off.

    Args:
        weights: float32, any shape.
        generator: where the randomness comes from; the same state gives the same result.

    Returns:
        bfloat16, the same shape. Infinities and NaN stay what they are.

    Raises:
        InputError: not float32.
    """
    if weights.dtype != torch.float32:
        raise InputError(f"Stochastic rounding takes float32, not {weights.dtype}.")
    noise = torch.randint(
        0, 1 << 16, weights.shape, generator=generator, dtype=torch.int32, device=weights.device
    )
    bits = noise.add_(weights.contiguous().view(torch.int32)).bitwise_and_(-(1 << 16))
    return bits.view(torch.float32).to(torch.bfloat16)
