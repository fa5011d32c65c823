"""Chooses between the kernels of `steer_kernels.apollo` and the reference beside this file."""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from workbench.train import apollo_steps

__all__ = ["steps_for"]

LARGEST_RANK = 512
MOST_ELEMENTS = 2**31  # places of 64 bits would fill the kernels' registers


def steps_for(weight: Tensor, rank: int) -> ModuleType:
    """Return the module whose `dense_step`, `factored_step` and `adamw_step` move `weight`.

    The kernels take CUDA tensors of float32 or bfloat16 whose elements 32 bits can number, and
    ranks that fit a tile.
    """
    fits = (
        weight.dtype in (torch.float32, torch.bfloat16)
        and weight.numel() < MOST_ELEMENTS
        and rank <= LARGEST_RANK
    )
    kernels = _kernels() if weight.is_cuda and fits else None
    return kernels or apollo_steps


@functools.cache
def _kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from steer_kernels import apollo  # noqa: PLC0415  # importing it imports triton

    return apollo
