"""The short causal convolution of Gated DeltaNet from a frozen state, and its SiLU.

Shape letters: B rows, T positions, C channels, W positions of the convolution, S those that the
state has.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["conv_reference", "conv_silu"]


def conv_silu(
    x_BTC: Tensor, state_BCS: Tensor, taps_CW: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, ...]:
    """As `conv_reference`, by kernels where they run: on CUDA, not float64."""
    chosen: Any = conv_reference
    if x_BTC.is_cuda and find_spec("triton") is not None and x_BTC.element_size() <= 4:
        chosen = import_module("steer_kernels.conv_triton").conv_silu
    return chosen(x_BTC, state_BCS, taps_CW, sizes)


def conv_reference(
    x_BTC: Tensor, state_BCS: Tensor, taps_CW: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, ...]:
    """Return `silu(sum_w taps_w x_(t-W+1+w))`, cut along the channels into `sizes`.

    Positions before the first are the last W - 1 of the state, which is constant. Sums are in
    float32 at least.
    """
    taps, width = taps_CW.shape[1], x_BTC.shape[1]
    past_BTC = state_BCS.detach()[:, :, state_BCS.shape[2] - taps + 1 :].transpose(1, 2)
    wide = torch.promote_types(x_BTC.dtype, torch.float32)
    all_BTC, taps_CW = torch.cat([past_BTC, x_BTC], 1).to(wide), taps_CW.to(wide)
    # Not one sum of a stack: a compiler would write the stack to memory.
    mixed_BTC = all_BTC[:, :width] * taps_CW[:, 0]
    for w in range(1, taps):
        mixed_BTC = mixed_BTC + all_BTC[:, w : w + width] * taps_CW[:, w]
    return F.silu(mixed_BTC).to(x_BTC.dtype).split(list(sizes), 2)
