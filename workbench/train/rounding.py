"""Rounding to bfloat16 that is right on average, and the counted random numbers it takes.

Shape letters: M x N a matrix, A = ceil(M / 128) * 64 its pairs of rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vectors.errors import InputError

__all__ = ["counted_noise", "random_words", "round_with", "stochastic_round"]

HALF = 1 << 16
GROUP = 128


def stochastic_round(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Round float32 to bfloat16, up or down with probability in proportion to nearness.

    `P[up] = (w - down) / (up - down)`, hence `E[round(w)] = w`: an update far smaller than the
    spacing of bfloat16 still arrives on average, where rounding to nearest would lose it every
    time (Gupta et al., arXiv:1502.02551, section 3.1).

    Args:
        weights: float32, any shape.
        generator: where the randomness comes from; the same state gives the same result.

    Returns:
        bfloat16, the same shape. Infinities and NaN stay what they are.

    Raises:
        InputError: not float32.
    """
    noise = torch.randint(
        0, HALF, weights.shape, generator=generator, dtype=torch.int32, device=weights.device
    )
    return round_with(weights, noise)


def round_with(weights: Tensor, noise: Tensor) -> Tensor:
    """Round as `stochastic_round` does, by 16-bit uniform numbers in int32.

    A bfloat16 is the upper half of a float32, so that the number is added to the lower half and
    what does not carry is cut off.

    Raises:
        InputError: not float32.
    """
    if weights.dtype != torch.float32:
        raise InputError(f"Stochastic rounding takes float32, not {weights.dtype}.")
    # A GPU's NaN is 0x7fffffff, which a carry would turn into -0.
    noise = noise.masked_fill(~weights.isfinite(), 0)
    bits = noise.add_(weights.contiguous().view(torch.int32)).bitwise_and_(-HALF)
    return bits.view(torch.float32).to(torch.bfloat16)


def counted_noise(shape: tuple[int, int], key: int, turn: Tensor) -> Tensor:
    """Return a 16-bit uniform number for each element, a function of its place, `key` and `turn`.

    Rows i and i + 64 of each group of 128 rows share the two halves of one 32-bit word, whose
    counter is `(64 * group + i) * N + column` modulo 2^32. A kernel makes the same numbers where
    it needs them, and the tiles it works in do not change them.

    Args:
        shape: M, N.
        key: 32 bits of the parameter.
        turn: int32 scalar of the step.

    Returns:
        int32 `[M, N]`.
    """
    rows, columns = shape
    pairs = math.ceil(rows / GROUP) * GROUP // 2
    low_only = rows <= GROUP // 2
    counter = torch.arange(
        (rows if low_only else pairs) * columns, dtype=torch.int64, device=turn.device
    )
    words_AN = random_words(counter.to(torch.int32).view(-1, columns), key, turn)
    low_AN = words_AN & (HALF - 1)
    if low_only:
        return low_AN
    high_AN = (words_AN >> 16) & (HALF - 1)
    both = [half.view(-1, GROUP // 2, columns) for half in (low_AN, high_AN)]
    return torch.stack(both, 1).view(-1, columns)[:rows]


def random_words(counter: Tensor, key: int, turn: int | Tensor) -> Tensor:
    """Return 32 random bits for each int32 counter, in place.

    Three multiplications between four shifts mix a 32-bit word thoroughly (the constants are those
    of Wellons' triple32, public domain, found by search for the smallest bias). The keys enter
    before the first and before the second, so that streams of different turns are no shifts of
    each other.
    """
    x = _fold(counter.add_(key), 17).mul_(_signed(0xED5AD4BB))
    x = _fold(x, 11).add_(turn).mul_(_signed(0xAC4C1B51))
    return _fold(_fold(x, 15).mul_(0x31848BAB), 14)


def _fold(x: Tensor, by: int) -> Tensor:
    """x ^ (x >> by), the shift without sign."""
    return x.bitwise_xor_((x >> by).bitwise_and_((1 << (32 - by)) - 1))


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
