"""The gated delta rule: the Triton kernels where they can run, else the reference."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from steer_kernels import gdn_reference

__all__ = ["delta_kernels_take", "gated_delta_rule"]


def gated_delta_rule(
    q_BTJK: Tensor,
    k_BTJK: Tensor,
    v_BTHE: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    state_BHKE: Tensor,
    lengths_B: Tensor | None = None,
    scale: float | None = None,
    normalise: bool = False,
) -> Tensor:
    """As `steer_kernels.gdn_reference.gated_delta_rule`, by kernels where they run."""
    chosen: Any = gdn_reference
    if delta_kernels_take(q_BTJK, v_BTHE):
        chosen = import_module("steer_kernels.gdn_triton")
    return chosen.gated_delta_rule(
        q_BTJK, k_BTJK, v_BTHE, g_BTH, beta_BTH, state_BHKE, lengths_B, scale, normalise
    )


def delta_kernels_take(q_BTJK: Tensor, v_BTHE: Tensor) -> bool:
    """Say whether the kernels compute these: on CUDA, not float64, heads 16 to 128 wide."""
    return (
        v_BTHE.is_cuda
        and find_spec("triton") is not None
        and v_BTHE.element_size() <= 4
        and q_BTJK.shape[3] in gdn_reference.WIDTHS
        and v_BTHE.shape[3] in gdn_reference.WIDTHS
    )
