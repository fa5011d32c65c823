"""What APOLLO multiplies a gradient with, and the moments that it and AdamW keep.

`state` belongs to one parameter (`step`, counted from 1, `exp_avg`, `exp_avg_sq`, `norm`) and is
advanced; `group` holds the options of `workbench.train.apollo.Apollo`, which has the equations.

Shape letters: M x N a weight matrix, S = min(M, N), R the rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from workbench.train.projection import projection

__all__ = ["adam_direction", "channel_scaling"]

TINY = 1e-8


def channel_scaling(
    grad_MN: Tensor, state: dict[str, Any], group: dict[str, Any], key: tuple[int, ...]
) -> Tensor:
    """Return what G is multiplied with, `[M, 1]`, `[1, N]` or `[1, 1]`, and advance the moments."""
    rows, columns = grad_MN.shape
    small = min(rows, columns)
    P_RS = projection(group["rank"], small, key, grad_MN.device, grad_MN.dtype)
    axis = 1 if rows >= columns else 0
    R = grad_MN @ P_RS.T if axis == 1 else P_RS @ grad_MN
    Q, after = _adam_ratio(R, state, group)
    axes = (0, 1) if group["scaling"] == "tensor" else (axis,)
    s = _norm(Q, axes) / (_norm(R, axes) + TINY)
    alpha = math.sqrt(small / group["rank"]) if group["scale"] == "auto" else group["scale"]
    # ||s G|| from the norms of G's channels: the gradient itself is not read again for the limiter.
    norm = _norm(s * _norm(grad_MN, axes), (0, 1)).reshape(())
    return s * (alpha * after / _limit(norm, state, group))


def _limit(norm: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Return the factor by which an update of this norm grew too fast, 1 where it did not."""
    limiter = group["limiter"]
    if limiter is None:
        return torch.ones_like(norm)
    before = state.get("norm", torch.full_like(norm, math.inf))
    if not group["compat"]:
        # A step without gradient says nothing about the size of the next one.
        before = torch.where(before > 0, before, math.inf)
    growth = (norm / (before + TINY)).clamp_min(limiter) / limiter
    state["norm"] = norm / growth
    return growth


def adam_direction(grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Return AdamW's step, of any shape, before the learning rate, and advance the moments."""
    direction, after = _adam_ratio(grad, state, group)
    return direction * after


def _adam_ratio(grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> tuple[Tensor, float]:
    """Advance the moments; return m / (sqrt(v) + eps) and the correction still to be applied."""
    if "exp_avg" not in state:
        state["exp_avg"] = torch.zeros_like(grad, memory_format=torch.contiguous_format)
        state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
    beta1, beta2 = group["betas"]
    m = state["exp_avg"].lerp_(grad, 1 - beta1)
    v = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    first, second = 1 - beta1 ** state["step"], math.sqrt(1 - beta2 ** state["step"])
    if group["compat"]:
        return m / v.sqrt().add_(group["eps"]), second / first
    return m / v.sqrt().div_(second).add_(group["eps"]).mul_(first), 1.0


def _norm(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(x, dim=axes, keepdim=True)
