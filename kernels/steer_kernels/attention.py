"""Frozen-prefix attention: the Triton kernels where they can run, else the reference."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from steer_kernels import attention_reference

__all__ = ["attention_kernels_take", "frozen_prefix_attention"]


def frozen_prefix_attention(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTK: Tensor,
    prefix_k_BGPK: Tensor,
    prefix_v_BGPK: Tensor,
    prefix_lengths_B: Tensor | None = None,
    lengths_B: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """As `steer_kernels.attention_reference.frozen_prefix_attention`, by kernels where they run."""
    chosen: Any = attention_reference
    if attention_kernels_take(q_BHTK, prefix_k_BGPK):
        chosen = import_module("steer_kernels.attention_triton")
    return chosen.frozen_prefix_attention(
        q_BHTK,
        k_BGTK,
        v_BGTK,
        prefix_k_BGPK,
        prefix_v_BGPK,
        prefix_lengths_B,
        lengths_B,
        scale,
    )


def attention_kernels_take(q_BHTK: Tensor, prefix_k_BGPK: Tensor) -> bool:
    """Say whether the kernels compute these: 16-bit floats on CUDA, widths of 16 to 256, a prefix."""
    return (
        q_BHTK.is_cuda
        and find_spec("triton") is not None
        and q_BHTK.dtype in (torch.bfloat16, torch.float16)
        and prefix_k_BGPK.shape[2] > 0
        and q_BHTK.shape[3] in attention_reference.WIDTHS
    )
