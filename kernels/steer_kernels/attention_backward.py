"""Triton kernels of the backward pass of frozen-prefix attention.

The prefix gets no gradient, so its blocks cost three products (scores, their gradient, the query's
gradient) where a full backward pass has five. Only the decision's own keys and values get the rest.

Shape letters: as in `attention_forward`; rows of a tile run token by token, head by head.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# A kernel is written in Triton's language, in which ranges and pointer types mean something else.
from __future__ import annotations

import triton
import triton.language as tl

from steer_kernels.attention_forward import block_keys, rows_of_tile, split_bounds

__all__ = ["key_value_gradient_kernel", "query_gradient_kernel"]


@triton.jit
def _query_gradient(acc_MK, scores_MN, d_weights_MN, lse_M, delta_M, k_NK, scale_log2):
    """Add one block's part of `dS K`, where `dS = A (dA - delta)` and `A = 2^(scores - lse)`."""
    weights_MN = tl.exp2(scores_MN * scale_log2 - lse_M[:, None])
    d_scores_MN = weights_MN * (d_weights_MN - delta_M[:, None])
    return tl.dot(d_scores_MN.to(k_NK.dtype), k_NK, acc_MK)


@triton.jit
def query_gradient_kernel(
    q,
    k,
    v,
    prefix_k,
    prefix_v,
    prefix_lengths,
    lengths,
    out,
    d_out,
    lse,
    delta,
    partial,
    q_b,
    q_h,
    q_t,
    k_b,
    k_g,
    k_t,
    v_b,
    v_g,
    v_t,
    o_b,
    o_h,
    o_t,
    d_b,
    d_h,
    d_t,
    T,
    P,
    G,
    scale_log2,
    K: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """One program: the gradient of M query rows from one split of the prefix, not yet scaled.

    The last split takes the decision's own keys too, and the first stores
    `delta_i = sum_c out_ic d_out_ic`.
    """
    tile, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    bg = tl.program_id(2)
    b, group = bg // G, bg % G
    length = tl.load(lengths + b)
    if tile * M >= length * R:
        return
    column_K = tl.arange(0, K)
    row_M, t_M, o_M, real_M = rows_of_tile(tile, group, lengths, b, o_h, o_t, R, M)
    _, _, d_M, _ = rows_of_tile(tile, group, lengths, b, d_h, d_t, R, M)
    _, _, q_M, _ = rows_of_tile(tile, group, lengths, b, q_h, q_t, R, M)
    o_at_MK = b.to(tl.int64) * o_b + o_M[:, None] + column_K[None, :]
    d_at_MK = b.to(tl.int64) * d_b + d_M[:, None] + column_K[None, :]
    q_at_MK = b.to(tl.int64) * q_b + q_M[:, None] + column_K[None, :]
    d_out_MK = tl.load(d_out + d_at_MK, mask=real_M[:, None], other=0.0)
    out_MK = tl.load(out + o_at_MK, mask=real_M[:, None], other=0.0)
    delta_M = tl.sum(out_MK.to(tl.float32) * d_out_MK.to(tl.float32), 1)
    at_M = bg.to(tl.int64) * T * R + row_M
    if split == 0:
        tl.store(delta + at_M, delta_M, mask=real_M)
    lse_M = tl.load(lse + at_M, mask=real_M, other=float("inf"))
    q_MK = tl.load(q + q_at_MK, mask=real_M[:, None], other=0.0)

    acc_MK = tl.zeros([M, K], tl.float32)
    first, whole, last = split_bounds(prefix_lengths, b, split, splits, P, N)
    for n in tl.range(first, whole, N):
        k_NK = prefix_k.load([b, group, n, 0]).reshape(N, K)
        v_NK = prefix_v.load([b, group, n, 0]).reshape(N, K)
        scores_MN = tl.dot(q_MK, k_NK.T)
        d_weights_MN = tl.dot(d_out_MK, v_NK.T)
        acc_MK = _query_gradient(acc_MK, scores_MN, d_weights_MN, lse_M, delta_M, k_NK, scale_log2)
    if whole < last:
        k_NK = prefix_k.load([b, group, whole, 0]).reshape(N, K)
        v_NK = prefix_v.load([b, group, whole, 0]).reshape(N, K)
        inside_N = whole + tl.arange(0, N) < last
        scores_MN = tl.where(inside_N[None, :], tl.dot(q_MK, k_NK.T), float("-inf"))
        d_weights_MN = tl.dot(d_out_MK, v_NK.T)
        acc_MK = _query_gradient(acc_MK, scores_MN, d_weights_MN, lse_M, delta_M, k_NK, scale_log2)
    if split == splits - 1:
        own_k = k + b.to(tl.int64) * k_b + group.to(tl.int64) * k_g
        own_v = v + b.to(tl.int64) * v_b + group.to(tl.int64) * v_g
        for n in tl.range(0, tl.minimum((tile * M + M - 1) // R + 1, length), N, num_stages=1):
            k_NK = block_keys(own_k, n, length, k_t, K, N)
            v_NK = block_keys(own_v, n, length, v_t, K, N)
            seen_MN = (n + tl.arange(0, N))[None, :] <= t_M[:, None]
            scores_MN = tl.where(seen_MN, tl.dot(q_MK, k_NK.T), float("-inf"))
            d_weights_MN = tl.dot(d_out_MK, v_NK.T)
            acc_MK = _query_gradient(
                acc_MK, scores_MN, d_weights_MN, lse_M, delta_M, k_NK, scale_log2
            )

    into_M = tl.cast(split, tl.int64) * tl.num_programs(2) * T * R + at_M
    tl.store(partial + into_M[:, None] * K + column_K[None, :], acc_MK, mask=real_M[:, None])


@triton.jit
def key_value_gradient_kernel(
    q,
    k,
    v,
    lengths,
    d_out,
    lse,
    delta,
    d_k,
    d_v,
    q_b,
    q_h,
    q_t,
    k_b,
    k_g,
    k_t,
    v_b,
    v_g,
    v_t,
    d_b,
    d_h,
    d_t,
    T,
    G,
    scale,
    scale_log2,
    K: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """One program: what every S-th tile of queries gives the gradients of N keys and values.

    `d_k` and `d_v` are `[S, B, G, T, K]`, contiguous; padding gets zeros.
    """
    block, bg, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, group = bg // G, bg % G
    length = tl.load(lengths + b)
    column_K = tl.arange(0, K)
    n_N = block * N + tl.arange(0, N)
    k_NK = block_keys(
        k + b.to(tl.int64) * k_b + group.to(tl.int64) * k_g, block * N, length, k_t, K, N
    )
    v_NK = block_keys(
        v + b.to(tl.int64) * v_b + group.to(tl.int64) * v_g, block * N, length, v_t, K, N
    )
    d_k_NK = tl.zeros([N, K], tl.float32)
    d_v_NK = tl.zeros([N, K], tl.float32)
    # The first query that sees any of these keys is at the position of the first key.
    first, splits = block * N * R // M, tl.num_programs(2)
    for tile in tl.range(first + split, tl.cdiv(length * R, M), splits, num_stages=1):
        row_M, t_M, q_M, real_M = rows_of_tile(tile, group, lengths, b, q_h, q_t, R, M)
        _, _, d_M, _ = rows_of_tile(tile, group, lengths, b, d_h, d_t, R, M)
        q_at_MK = b.to(tl.int64) * q_b + q_M[:, None] + column_K[None, :]
        d_at_MK = b.to(tl.int64) * d_b + d_M[:, None] + column_K[None, :]
        q_MK = tl.load(q + q_at_MK, mask=real_M[:, None], other=0.0)
        d_out_MK = tl.load(d_out + d_at_MK, mask=real_M[:, None], other=0.0)
        at_M = bg.to(tl.int64) * T * R + row_M
        lse_M = tl.load(lse + at_M, mask=real_M, other=float("inf"))
        delta_M = tl.load(delta + at_M, mask=real_M, other=0.0)
        weights_NM = tl.exp2(tl.dot(k_NK, q_MK.T) * scale_log2 - lse_M[None, :])
        weights_NM = tl.where(n_N[:, None] <= t_M[None, :], weights_NM, 0.0)
        d_v_NK = tl.dot(weights_NM.to(d_out_MK.dtype), d_out_MK, d_v_NK)
        d_scores_NM = weights_NM * (tl.dot(v_NK, d_out_MK.T) - delta_M[None, :])
        d_k_NK = tl.dot(d_scores_NM.to(q_MK.dtype), q_MK, d_k_NK)
    at = (split * tl.num_programs(1) + bg).to(tl.int64)
    into_NK = (at * T + n_N)[:, None] * K + column_K[None, :]
    inside_NK = n_N[:, None] < T
    tl.store(d_k + into_NK, (d_k_NK * scale).to(d_k.dtype.element_ty), mask=inside_NK)
    tl.store(d_v + into_NK, d_v_NK.to(d_v.dtype.element_ty), mask=inside_NK)
