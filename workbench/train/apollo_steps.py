"""One step of APOLLO and of AdamW over a list of weights: the reference of the kernels.

    channels     of a matrix G [M, N]: its rows where M >= N, its columns otherwise
    R            G P^T by channels                      P = signs^T / sqrt(rank)
    m, v         averages of R and R^2, corrected for bias: m^, v^
    s            ||m^ / (sqrt(v^) + eps)|| / ||R||      one for each channel, "tensor": one in all
    U            alpha s G, cut to `limiter` times the last U's norm where it grew faster
    W            W (1 - lr wd) - lr U

`compat` leaves m and v uncorrected, corrects U after the limiter, and decays the updated weights.

Every number of a step that changes from one to the next lies in `dials` on the device, so that a
captured graph of a step can be replayed with other numbers:

    0 lr    1 1 - lr wd    2 1 - b1^t    3 sqrt(1 - b2^t)    4, 5 lower and upper half of `turn`

`steer_kernels.apollo` has the same functions for CUDA; `workbench.train.apollo_kernels` chooses.
Nothing here waits for the device.

Shape letters: C = max(M, N) channels, S = min(M, N), R the rank, D tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypedDict

import torch
from torch import Tensor

from workbench.train.rounding import counted_noise, round_with

__all__ = ["Rule", "adamw_step", "dense_step", "factored_step", "make_dials"]

TINY = 1e-8


class Rule(TypedDict):
    """What does not change during training."""

    scaling: Literal["channel", "tensor"]
    scale: float | Literal["auto"]
    limiter: float | None
    betas: tuple[float, float]
    eps: float
    compat: bool


def make_dials(
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    step: int,
    turn: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the dials `[6]` of one step on the CPU."""
    first, second = 1 - betas[0] ** step, math.sqrt(1 - betas[1] ** step)
    halves = (turn & 0xFFFF, (turn >> 16) & 0xFFFF)
    return torch.tensor([lr, 1 - lr * weight_decay, first, second, *halves], dtype=dtype)


def dense_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    norms: Sequence[Tensor],
    keys: Sequence[int],
    signs_SR: Tensor,
    dials: Tensor,
    **rule,
) -> None:
    """Move matrices by their gradients (Zhu et al., arXiv:2412.05270, algorithm 1).

    Args:
        weights: `[M, N]` each, float32, float64 or bfloat16 (rounded stochastically).
        gradients: of the weights' shapes.
        firsts, seconds: m and v, `[C, R]`, float32 (float64 with float64 weights).
        norms: the last update's norm, a scalar each; infinite before the first.
        keys: 32 bits each, of the rounding.
        signs_SR: as `workbench.train.projection.projection` makes them, for the largest S or more.
        dials: see above.
        rule: `Rule`.
    """
    for weight, gradient, m, v, norm, key in zip(
        weights, gradients, firsts, seconds, norms, keys, strict=True
    ):
        _move_matrix(weight, gradient, m, v, norm, key, signs_SR, dials, rule)


def factored_step(
    weights: Sequence[Tensor],
    inputs: Sequence[Tensor],
    output_grads: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    norms: Sequence[Tensor],
    keys: Sequence[int],
    signs_SR: Tensor,
    dials: Tensor,
    **rule,
) -> None:
    """Move matrices by the factors of their gradients, `G = output_grad^T input`.

    Args:
        inputs: X `[D, N]` each.
        output_grads: dY `[D, M]` each.

    The others are those of `dense_step`. This reference forms G; the kernel never does.
    """
    for weight, x_DN, dy_DM, m, v, norm, key in zip(
        weights, inputs, output_grads, firsts, seconds, norms, keys, strict=True
    ):
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        gradient = dy_DM.to(wide).T @ x_DN.to(wide)
        _move_matrix(weight, gradient, m, v, norm, key, signs_SR, dials, rule)


def adamw_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    keys: Sequence[int],
    dials: Tensor,
    **rule,
) -> None:
    """Move weights of any shape as AdamW does; moments have the weights' shapes."""
    for weight, gradient, m, v, key in zip(weights, gradients, firsts, seconds, keys, strict=True):
        exact = weight if weight.dtype != torch.bfloat16 else weight.float()
        ratio, after = _adam_ratio(gradient.to(exact.dtype), m, v, dials, rule)
        _apply(weight, exact, ratio * (dials[0] * after), key, dials, rule, flat=True)


def _move_matrix(
    weight: Tensor,
    gradient: Tensor,
    m_CR: Tensor,
    v_CR: Tensor,
    norm: Tensor,
    key: int,
    signs_SR: Tensor,
    dials: Tensor,
    rule,
) -> None:
    exact = weight if weight.dtype != torch.bfloat16 else weight.float()
    grad = gradient.to(exact.dtype)
    tall = grad.shape[0] >= grad.shape[1]
    by_channel = grad if tall else grad.T
    small, rank = by_channel.shape[1], signs_SR.shape[1]
    R_CR = by_channel @ signs_SR[:small].to(exact.dtype) * rank**-0.5
    Q_CR, after = _adam_ratio(R_CR, m_CR, v_CR, dials, rule)
    axes = (0, 1) if rule["scaling"] == "tensor" else (1,)
    s = _norm(Q_CR, axes) / (_norm(R_CR, axes) + TINY)
    alpha = math.sqrt(small / rank) if rule["scale"] == "auto" else rule["scale"]
    # ||s G|| from the norms of G's channels: the gradient itself is not read again for the limiter.
    grown = _limit(_norm(s * _norm(by_channel, axes), (0, 1)).reshape(()), norm, rule)
    s = s * (dials[0] * alpha * after / grown)
    _apply(weight, exact, grad * (s if tall else s.T), key, dials, rule)


def _limit(norm: Tensor, before: Tensor, rule) -> Tensor:
    """Return the factor by which an update grew too fast, 1 where it did not; keep its norm."""
    limiter = rule["limiter"]
    if limiter is None:
        return torch.ones_like(norm)
    # A step without gradient says nothing about the size of the next one.
    known = before if rule["compat"] else torch.where(before > 0, before, math.inf)
    growth = (norm / (known + TINY)).clamp_min(limiter) / limiter
    before.copy_(norm / growth)
    return growth


def _adam_ratio(
    grad: Tensor, m: Tensor, v: Tensor, dials: Tensor, rule
) -> tuple[Tensor, Tensor | float]:
    """Advance the moments; return m / (sqrt(v) + eps) and the correction still to be applied."""
    beta1, beta2 = rule["betas"]
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    first, second = dials[2], dials[3]
    if rule["compat"]:
        return m / v.sqrt().add_(rule["eps"]), second / first
    return m / v.sqrt().div_(second).add_(rule["eps"]).mul_(first), 1.0


def _apply(
    weight: Tensor, exact: Tensor, update: Tensor, key: int, dials: Tensor, rule, flat: bool = False
) -> None:
    """Decay, subtract and round; AdamW counts the elements of any shape in one row."""
    if not rule["compat"]:
        exact.mul_(dials[1])
    exact.sub_(update)
    if rule["compat"]:
        exact.mul_(dials[1])
    if exact is not weight:
        turn = (dials[4].to(torch.int64) | dials[5].to(torch.int64) << 16).to(torch.int32)
        shape = (1, weight.numel()) if flat else (weight.shape[0], weight.shape[1])
        noise = counted_noise(shape, key, turn)
        weight.copy_(round_with(exact.reshape(shape), noise).view(weight.shape))


def _norm(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(x, dim=axes, keepdim=True)
