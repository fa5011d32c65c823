"""Triton kernel of the gated delta rule, forward, all chunks of a short decision in one launch.

Within a chunk of C positions with summed log-decays `G`, `D_ij = exp(G_i - G_j)` and the chunk's
first state `S`, the rule is a unit lower triangular system (Yang et al., arXiv:2412.06464, 3.3):

    A_ij = beta_i (k_i . k_j) D_ij, j < i        (I + A) u = beta (v - exp(G) S' k)
    o = scale (exp(G) S' q + ((q k') * D) u)      S <- exp(G_C) S + (exp(G_C - G) k)' u

One program walks the chunks of one value head and some of its columns, because `S` is known when
the system is solved: there is one right-hand side, and columns are independent of each other.

Shape letters: B rows, T positions, J query-key heads, H value heads, K and E widths of a query-key
and of a value head, C = 2 ** LEVELS positions of a chunk, F columns of the state in a
program.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# A kernel is written in Triton's language, in which ranges and pointer types mean something else.
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["chunk_decays", "forward_kernel", "load_normalised", "load_rows"]


@triton.jit
def load_rows(base, t_C, real_C, stride_t, stride_c, first, W: tl.constexpr):
    """Load `[C, W]` in float32 from column `first`; zeros where a position is not real."""
    column_W = first + tl.arange(0, W)
    at_CW = t_C[:, None].to(tl.int64) * stride_t + column_W[None, :].to(tl.int64) * stride_c
    return tl.load(base + at_CW, mask=real_C[:, None], other=0.0).to(tl.float32)


@triton.jit
def load_normalised(
    base, t_C, real_C, stride_t, stride_c, K: tl.constexpr, NORMALISE: tl.constexpr
):
    """Load queries or keys `[C, K]`, and the factors `[C]` that bring them to length one."""
    x_CK = load_rows(base, t_C, real_C, stride_t, stride_c, 0, K)
    factor_C = tl.full([x_CK.shape[0]], 1.0, tl.float32)
    if NORMALISE:
        factor_C = 1.0 / tl.sqrt(tl.sum(x_CK * x_CK, 1) + 1e-6)
    return x_CK * factor_C[:, None], factor_C


@triton.jit
def chunk_decays(g_C, C: tl.constexpr):
    """Return `G`, its last value, and `D_ij` for `j <= i`, zero above."""
    sum_C = tl.cumsum(g_C, 0)
    i_C = tl.arange(0, C)
    past_CC = i_C[:, None] >= i_C[None, :]
    decay_CC = tl.exp(tl.where(past_CC, sum_C[:, None] - sum_C[None, :], float("-inf")))
    return sum_C, tl.sum(g_C, 0), decay_CC


@triton.jit
def _unit_lower_inverse(a_CC, C: tl.constexpr, LEVELS: tl.constexpr):
    """Return `(I + A)^-1` of a strictly lower `A`, from blocks of 2 on the diagonal up to C.

    With `B` the blocks' inverses and `F` what joins pairs of blocks, `(B^-1 + F)^-1 = B - B F B`:
    only true inverses occur on the way, so that no digits are lost where keys repeat.
    """
    i_C = tl.arange(0, C)
    apart_CC = i_C[:, None] ^ i_C[None, :]  # below 2s where a pair of blocks of size s is shared
    inverse_CC = tl.where(apart_CC == 0, 1.0, tl.where(apart_CC == 1, -a_CC, 0.0))
    for level in tl.static_range(1, LEVELS):
        far_CC = tl.where(apart_CC >> level == 1, a_CC, 0.0)
        change_CC = tl.dot(far_CC, inverse_CC, input_precision="tf32x3")
        inverse_CC -= tl.dot(inverse_CC, change_CC, input_precision="tf32x3")
    return inverse_CC


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    g,
    beta,
    state,
    lengths,
    out,
    updates,
    inverses,
    states,
    q_b,
    q_t,
    q_h,
    q_c,
    k_b,
    k_t,
    k_h,
    k_c,
    v_b,
    v_t,
    v_h,
    v_c,
    g_b,
    g_t,
    g_h,
    beta_b,
    beta_t,
    beta_h,
    T,
    H,
    scale,
    SHARE: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
    NORMALISE: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """One program: F columns of one value head's state, through all chunks.

    `state`, `out` `[B, T, H, E]`, `updates` `[B, H, T, E]`, `inverses` `[B, H, chunks, C, C]` and
    `states` `[B, H, chunks, K, E]` (before each chunk) are contiguous.
    """
    first, bh = tl.program_id(0) * F, tl.program_id(1).to(tl.int64)
    b, head = bh // H, bh % H
    length, chunks = tl.load(lengths + b), tl.cdiv(T, C)
    i_C, i_K, i_F = tl.arange(0, C), tl.arange(0, K), first + tl.arange(0, F)
    at_KF = i_K[:, None] * E + i_F[None, :]
    state_KF = tl.load(state + bh * K * E + at_KF).to(tl.float32)
    below_CC = i_C[:, None] > i_C[None, :]
    for chunk in range(chunks):
        t_C = chunk * C + i_C
        real_C = t_C < length
        q_head, k_head = q + b * q_b + head // SHARE * q_h, k + b * k_b + head // SHARE * k_h
        q_CK, _ = load_normalised(q_head, t_C, real_C, q_t, q_c, K, NORMALISE)
        k_CK, _ = load_normalised(k_head, t_C, real_C, k_t, k_c, K, NORMALISE)
        v_CF = load_rows(v + b * v_b + head * v_h, t_C, real_C, v_t, v_c, first, F)
        g_C = tl.load(g + b * g_b + head * g_h + t_C * g_t, mask=real_C, other=0.0)
        beta_C = tl.load(beta + b * beta_b + head * beta_h + t_C * beta_t, mask=real_C, other=0.0)
        beta_C = beta_C.to(tl.float32)
        sum_C, total, decay_CC = chunk_decays(g_C.to(tl.float32), C)
        weights_CC = tl.dot(k_CK, tl.trans(k_CK)) * decay_CC * beta_C[:, None]
        inverse_CC = _unit_lower_inverse(tl.where(below_CC, weights_CC, 0.0), C, LEVELS)
        if first == 0:
            at_CC = i_C[:, None] * C + i_C[None, :]
            tl.store(inverses + (bh * chunks + chunk) * C * C + at_CC, inverse_CC)
        tl.store(states + (bh * chunks + chunk) * K * E + at_KF, state_KF)

        fade_C = tl.exp(sum_C)
        known_CF = tl.dot(k_CK, state_KF) * fade_C[:, None]
        update_CF = tl.dot(inverse_CC, beta_C[:, None] * (v_CF - known_CF))
        read_CF = tl.dot(q_CK, state_KF) * fade_C[:, None]
        read_CF += tl.dot(tl.dot(q_CK, tl.trans(k_CK)) * decay_CC, update_CF)
        kept_CK = k_CK * tl.exp(total - sum_C)[:, None]
        state_KF = state_KF * tl.exp(total) + tl.dot(tl.trans(kept_CK), update_CF)

        inside_CF = t_C[:, None] < T
        at_CF = ((b * T + t_C[:, None]) * H + head) * E + i_F[None, :]
        tl.store(out + at_CF, (read_CF * scale).to(out.dtype.element_ty), mask=inside_CF)
        at_CF = (bh * T + t_C[:, None]) * E + i_F[None, :]
        tl.store(updates + at_CF, update_CF, mask=inside_CF)
