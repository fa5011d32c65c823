"""Triton kernels of the gated delta rule, forward: what stands alone first, then the chain.

Within a chunk of C positions with summed log-decays `G`, `D_ij = exp(G_i - G_j)` and the chunk's
first state `S`, the rule is a unit lower triangular system (Yang et al., arXiv:2412.06464, 3.3):

    A_ij = beta_i (k_i . k_j) D_ij, j < i        (I + A) u = beta (v - exp(G) S' k)
    o = scale (exp(G) S' q + ((q k') * D) u)      S <- exp(G_C) S + (exp(G_C - G) k)' u

Only `S` hands on from chunk to chunk. With `M = (I + A)^-1`, `W = M (beta exp(G) k)` and
`U = M (beta v)`, which all chunks find at the same time, `u = U - W S`: the chain is left with four
small products a chunk, and its columns are independent of each other.

Shape letters: B rows, T positions, J query-key heads, H value heads, K and E widths of a query-key
and of a value head, C = 2 ** LEVELS positions of a chunk, P positions of all chunks, F columns of
the state in a program.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# A kernel is written in Triton's language, in which ranges and pointer types mean something else.
from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "chain_kernel",
    "chunk_decays",
    "load_gates",
    "load_normalised",
    "load_rows",
    "prepare_kernel",
]


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
def load_gates(base, t_C, real_C, stride_t):
    """Load decays or betas `[C]` in float32; zeros where a position is not real."""
    return tl.load(base + t_C * stride_t, mask=real_C, other=0.0).to(tl.float32)


@triton.jit
def chunk_decays(g_C, C: tl.constexpr):
    """Return `G`, its last value, and `D_ij` for `j <= i`, zero above."""
    sum_C = tl.cumsum(g_C, 0)
    i_C = tl.arange(0, C)
    past_CC = i_C[:, None] >= i_C[None, :]
    decay_CC = tl.exp(tl.where(past_CC, sum_C[:, None] - sum_C[None, :], float("-inf")))
    return sum_C, tl.sum(g_C, 0), decay_CC


@triton.jit
def _unit_lower_inverse(a_CC, C: tl.constexpr, LEVELS: tl.constexpr, DIGITS: tl.constexpr):
    """Return `(I + A)^-1` of a strictly lower `A`, from blocks of 2 on the diagonal up to C.

    With `B` the blocks' inverses and `F` what joins pairs of blocks, `(B^-1 + F)^-1 = B - B F B`:
    only true inverses occur on the way, so that no digits are lost where keys repeat.
    """
    i_C = tl.arange(0, C)
    apart_CC = i_C[:, None] ^ i_C[None, :]  # below 2s where a pair of blocks of size s is shared
    inverse_CC = tl.where(apart_CC == 0, 1.0, tl.where(apart_CC == 1, -a_CC, 0.0))
    for level in tl.static_range(1, LEVELS):
        far_CC = tl.where(apart_CC >> level == 1, a_CC, 0.0)
        change_CC = tl.dot(far_CC, inverse_CC, input_precision=DIGITS)
        inverse_CC -= tl.dot(inverse_CC, change_CC, input_precision=DIGITS)
    return inverse_CC


@triton.jit
def prepare_kernel(
    q,
    k,
    v,
    g,
    beta,
    lengths,
    queries,
    keys,
    weights,
    reads,
    inverses,
    updates,
    fades,
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
    H,
    scale,
    SHARE: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    NORMALISE: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """One program: all that one chunk of one value head has without its state.

    Contiguous: `queries` = scale exp(G) q, `keys` = exp(G_C - G) k and `weights` = W `[B, H, P, K]`,
    `updates` = U `[B, H, P, E]`, `reads` = scale (q k') * D and `inverses` = M `[B, H, P, C]`,
    `fades` = exp(G_C) `[B, H, chunks]`. Products are of the dtype of `weights`.
    """
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, head, at = bh // H, bh % H, bh * tl.num_programs(0) + chunk
    i_C, i_K, i_E = tl.arange(0, C), tl.arange(0, K), tl.arange(0, E)
    t_C = chunk * C + i_C
    kind: tl.constexpr = weights.dtype.element_ty
    real_C = t_C < tl.load(lengths + b)
    at_CC = (at * C + i_C[:, None]) * C + i_C[None, :]
    at_CK = (at * C + i_C[:, None]) * K + i_K[None, :]
    at_CE = (at * C + i_C[:, None]) * E + i_E[None, :]
    g_C = load_gates(g + b * g_b + head * g_h, t_C, real_C, g_t)
    beta_C = load_gates(beta + b * beta_b + head * beta_h, t_C, real_C, beta_t)
    sum_C, total, decay_CC = chunk_decays(g_C, C)
    tl.store(fades + at, tl.exp(total))

    k_head = k + b * k_b + head // SHARE * k_h
    k_CK, _ = load_normalised(k_head, t_C, real_C, k_t, k_c, K, NORMALISE)
    tl.store(keys + at_CK, (k_CK * tl.exp(total - sum_C)[:, None]).to(kind))
    faded_CK = (k_CK * (beta_C * tl.exp(sum_C))[:, None]).to(kind)
    k_CK = k_CK.to(kind)
    # bfloat16 products round far more than tf32 does.
    digits: tl.constexpr = "tf32x3" if kind == tl.float32 else "tf32"
    pairs_CC = tl.dot(k_CK, tl.trans(k_CK)) * decay_CC * beta_C[:, None]
    below_CC = i_C[:, None] > i_C[None, :]
    inverse_CC = _unit_lower_inverse(tl.where(below_CC, pairs_CC, 0.0), C, LEVELS, digits).to(kind)
    tl.store(inverses + at_CC, inverse_CC)
    tl.store(weights + at_CK, tl.dot(inverse_CC, faded_CK).to(kind))
    v_CE = load_rows(v + b * v_b + head * v_h, t_C, real_C, v_t, v_c, 0, E) * beta_C[:, None]
    tl.store(updates + at_CE, tl.dot(inverse_CC, v_CE.to(kind)))

    q_head = q + b * q_b + head // SHARE * q_h
    q_CK, _ = load_normalised(q_head, t_C, real_C, q_t, q_c, K, NORMALISE)
    tl.store(queries + at_CK, (q_CK * (tl.exp(sum_C) * scale)[:, None]).to(kind))
    reads_CC = tl.dot(q_CK.to(kind), tl.trans(k_CK)) * decay_CC * scale
    tl.store(reads + at_CC, reads_CC.to(kind))


@triton.jit
def chain_kernel(
    state,
    queries,
    keys,
    weights,
    reads,
    updates,
    fades,
    states,
    out,
    T,
    H,
    chunks,
    K: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
):
    """One program: F columns of one value head's state, through all chunks.

    `updates` is U before and u after; `states` `[B, H, chunks, K, E]` are those before each chunk;
    `out` `[B, T, H, E]` is contiguous. The others are those of `prepare_kernel`.
    """
    bh = tl.program_id(1).to(tl.int64)
    b, head = bh // H, bh % H
    kind: tl.constexpr = weights.dtype.element_ty
    i_C, i_K = tl.arange(0, C), tl.arange(0, K)
    i_F = tl.program_id(0) * F + tl.arange(0, F)
    at_KF = i_K[:, None] * E + i_F[None, :]
    at_CC, at_CK = i_C[:, None] * C + i_C[None, :], i_C[:, None] * K + i_K[None, :]
    at_KC, at_CF = i_K[:, None] + i_C[None, :] * K, i_C[:, None] * E + i_F[None, :]
    state_KF = tl.load(state + bh * K * E + at_KF).to(tl.float32)
    for chunk in range(chunks):
        at = bh * chunks + chunk
        held_KF = state_KF.to(kind)
        tl.store(states + at * K * E + at_KF, held_KF)
        weights_CK = tl.load(weights + at * C * K + at_CK)
        queries_CK = tl.load(queries + at * C * K + at_CK)
        keys_KC = tl.load(keys + at * C * K + at_KC)
        reads_CC = tl.load(reads + at * C * C + at_CC)
        update_CF = tl.load(updates + at * C * E + at_CF) - tl.dot(weights_CK, held_KF)
        tl.store(updates + at * C * E + at_CF, update_CF)
        update_CF = update_CF.to(kind)
        out_CF = tl.dot(queries_CK, held_KF) + tl.dot(reads_CC, update_CF)
        t_C = chunk * C + i_C
        at_out = ((b * T + t_C[:, None]) * H + head) * E + i_F[None, :]
        tl.store(out + at_out, out_CF.to(out.dtype.element_ty), mask=t_C[:, None] < T)
        state_KF = state_KF * tl.load(fades + at) + tl.dot(keys_KC, update_CF)
