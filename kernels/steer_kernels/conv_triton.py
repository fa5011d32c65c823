"""Triton kernels of the short convolution of queries, keys and values, forward and backward.

Shape letters: as in `conv`; R positions and D channels of a tile.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# A kernel is written in Triton's language, in which ranges and pointer types mean something else.
from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["conv_silu"]

ROWS, CHANNELS = 32, 32


def conv_silu(
    x_BTC: Tensor, state_BCS: Tensor, taps_CW: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, ...]:
    """Reference: `steer_kernels.conv.conv_reference`, with three sizes."""
    differentiable: Any = _ConvSilu.apply
    return differentiable(x_BTC, state_BCS, taps_CW, *sizes)


class _ConvSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        x, state, taps, *sizes = inputs
        rows, width, channels = x.shape
        cut = min(CHANNELS, *(gcd(size, CHANNELS) for size in sizes))
        parts = tuple(x.new_empty((rows, width, size)) for size in sizes)
        launch: Any = _forward_kernel
        launch[(-(-width // ROWS), channels // cut, rows)](
            x, state, taps, *parts, width, state.shape[2], *sizes,
            *x.stride(), *state.stride(), *taps.stride(),
            W=taps.shape[1], R=ROWS, D=cut, num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(x, state, taps)
        ctx.sizes, ctx.cut = sizes, cut
        return parts

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, state, taps = ctx.saved_tensors
        rows, width, channels = x.shape
        grads = [gradient.contiguous() for gradient in gradients]
        d_x = torch.empty((rows, width, channels), dtype=x.dtype, device=x.device)
        d_taps = torch.empty((rows, *taps.shape), dtype=torch.float32, device=x.device)
        launch: Any = _backward_kernel
        launch[(channels // ctx.cut, rows)](
            x, state, taps, *grads, d_x, d_taps, width, state.shape[2], *ctx.sizes,
            *x.stride(), *state.stride(), *taps.stride(),
            W=taps.shape[1], R=ROWS, D=ctx.cut, num_warps=4,
        )  # fmt: skip
        d_taps = d_taps[0] if rows == 1 else d_taps.sum(0)
        return d_x, None, d_taps.to(taps.dtype), None, None, None


@triton.jit
def _part(q, k, v, first, Q, K, V):
    """Return the pointer and the width of the part that a channel is in, and its place there."""
    if first < Q:
        part, size, at = q, Q, first
    else:
        if first < Q + K:
            part, size, at = k, K, first - Q
        else:
            part, size, at = v, V, first - Q - K
    return part, size, at


@triton.jit
def _position(x, state, begin, back, c_D, T, S, x_t, x_c, s_c, s_s, R: tl.constexpr):
    """Load `[R, D]` inputs from position `begin - back`; those before the first are the state's."""
    t_R = begin - back + tl.arange(0, R)
    at_RD = t_R[:, None] * x_t + c_D[None, :] * x_c
    x_RD = tl.load(x + at_RD, mask=((t_R >= 0) & (t_R < T))[:, None], other=0.0).to(tl.float32)
    if begin < back:
        at_RD = c_D[None, :] * s_c + (S + t_R)[:, None] * s_s
        x_RD += tl.load(state + at_RD, mask=(t_R < 0)[:, None], other=0.0).to(tl.float32)
    return x_RD


@triton.jit
def _mixed(
    x, state, taps, begin, c_D, T, S, x_t, x_c, s_c, s_s, w_c, w_w,
    W: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The convolution at R positions from `begin`."""
    mixed_RD = tl.zeros([R, c_D.shape[0]], tl.float32)
    for w in tl.static_range(W):
        tap_D = tl.load(taps + c_D * w_c + w * w_w).to(tl.float32)
        x_RD = _position(x, state, begin, W - 1 - w, c_D, T, S, x_t, x_c, s_c, s_s, R)
        mixed_RD += x_RD * tap_D[None, :]
    return mixed_RD


@triton.jit
def _forward_kernel(
    x, state, taps, q, k, v, T, S, Q, K, V,
    x_b, x_t, x_c, s_b, s_c, s_s, w_c, w_w,
    W: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One program: R positions of D channels, which are all in one part."""
    b = tl.program_id(2).to(tl.int64)
    begin, first = tl.program_id(0) * R, tl.program_id(1) * D
    t_R, c_D = begin + tl.arange(0, R), first + tl.arange(0, D)
    x, state = x + b * x_b, state + b * s_b
    mixed_RD = _mixed(x, state, taps, begin, c_D, T, S, x_t, x_c, s_c, s_s, w_c, w_w, W, R)
    out_RD = mixed_RD * tl.sigmoid(mixed_RD)
    part, size, at = _part(q, k, v, first, Q, K, V)
    into_RD = (b * T + t_R[:, None]) * size + at + tl.arange(0, D)[None, :]
    tl.store(part + into_RD, out_RD.to(q.dtype.element_ty), mask=(t_R < T)[:, None])


@triton.jit
def _backward_kernel(
    x, state, taps, d_q, d_k, d_v, d_x, d_taps, T, S, Q, K, V,
    x_b, x_t, x_c, s_b, s_c, s_s, w_c, w_w,
    W: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One program: all positions of D channels, and the gradients of their taps."""
    b, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * D
    i_D = tl.arange(0, D)
    c_D, i_W = first + i_D, tl.arange(0, W)
    x, state = x + b * x_b, state + b * s_b
    part, size, at = _part(d_q, d_k, d_v, first, Q, K, V)
    d_taps_WD = tl.zeros([W, D], tl.float32)
    for begin in range(0, T, R):
        t_R = begin + tl.arange(0, R)
        d_x_RD = tl.zeros([R, D], tl.float32)
        for ahead in tl.static_range(W):
            u_R = t_R + ahead
            mixed_RD = _mixed(
                x, state, taps, begin + ahead, c_D, T, S, x_t, x_c, s_c, s_s, w_c, w_w, W, R
            )
            from_RD = (b * T + u_R[:, None]) * size + at + i_D[None, :]
            d_RD = tl.load(part + from_RD, mask=(u_R < T)[:, None], other=0.0).to(tl.float32)
            gate_RD = tl.sigmoid(mixed_RD)
            d_RD *= gate_RD * (1.0 + mixed_RD * (1.0 - gate_RD))
            tap_D = tl.load(taps + c_D * w_c + (W - 1 - ahead) * w_w).to(tl.float32)
            d_x_RD += d_RD * tap_D[None, :]
            if ahead == 0:
                for w in tl.static_range(W):
                    x_RD = _position(x, state, begin, W - 1 - w, c_D, T, S, x_t, x_c, s_c, s_s, R)
                    d_tap_D = tl.sum(d_RD * x_RD, 0)
                    d_taps_WD += tl.where(i_W[:, None] == w, d_tap_D[None, :], 0.0)
        into_RD = (b * T + t_R[:, None]) * (Q + K + V) + c_D[None, :]
        tl.store(d_x + into_RD, d_x_RD.to(d_x.dtype.element_ty), mask=(t_R < T)[:, None])
    into_WD = (b * (Q + K + V) + c_D[None, :]) * W + i_W[:, None]
    tl.store(d_taps + into_WD, d_taps_WD)
