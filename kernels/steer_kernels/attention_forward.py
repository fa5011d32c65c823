"""Triton kernels of the forward pass of frozen-prefix attention.

The decision is short and the prefix long, so the prefix is cut into splits that different programs
read; each leaves a normalised partial sum and its log-sum-exp, and a second kernel combines them.
The query heads of one key-value head share a tile (rows run token by token, head by head), so that
the prefix is read once for all of them. Logarithms are to base 2.

Shape letters: B rows, G key-value heads, R query heads of each, T decision positions, P prefix
positions, K width of a head, M query rows of a tile, N keys of a block, S splits.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# A kernel is written in Triton's language, in which ranges and pointer types mean something else.
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["block_keys", "combine_kernel", "forward_kernel", "rows_of_tile", "split_bounds"]


@triton.jit
def rows_of_tile(tile, group, lengths, b, stride_head, stride_t, R: tl.constexpr, M: tl.constexpr):
    """Return rows, their positions, their offsets in a `[H, T, K]` tensor, and which are real."""
    row_M = tile * M + tl.arange(0, M)
    t_M = row_M // R
    head_M = group * R + row_M % R
    offset_M = head_M.to(tl.int64) * stride_head + t_M.to(tl.int64) * stride_t
    return row_M, t_M, offset_M, t_M < tl.load(lengths + b)


@triton.jit
def split_bounds(prefix_lengths, b, split, splits, P, N: tl.constexpr):
    """Return the first key of a split, the end of its whole blocks, and its end."""
    keys = tl.load(prefix_lengths + b)
    chunk = tl.cdiv(tl.cdiv(keys, splits), N) * N
    first = P - keys + split * chunk
    last = tl.maximum(tl.minimum(first + chunk, P), first)
    return first, first + (last - first) // N * N, last


@triton.jit
def block_keys(base, first, last, stride_t, K: tl.constexpr, N: tl.constexpr):
    """Load `[N, K]` decision keys or values from `first`; zeros from `last` on."""
    n_N = first + tl.arange(0, N)
    at_NK = n_N[:, None].to(tl.int64) * stride_t + tl.arange(0, K)[None, :]
    return tl.load(base + at_NK, mask=n_N[:, None] < last, other=0.0)


@triton.jit
def _add_block(acc_MK, top_M, sum_M, scores_MN, v_NK, scale_log2):
    """Fold one block of scores and values into a running softmax."""
    new_M = tl.maximum(top_M, tl.max(scores_MN, 1) * scale_log2)
    weights_MN = tl.exp2(scores_MN * scale_log2 - new_M[:, None])
    fade_M = tl.exp2(top_M - new_M)
    acc_MK = tl.dot(weights_MN.to(v_NK.dtype), v_NK, acc_MK * fade_M[:, None])
    return acc_MK, new_M, sum_M * fade_M + tl.sum(weights_MN, 1)


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    prefix_k,
    prefix_v,
    prefix_lengths,
    lengths,
    partial,
    partial_lse,
    q_b,
    q_h,
    q_t,
    k_b,
    k_g,
    k_t,
    v_b,
    v_g,
    v_t,
    T,
    P,
    G,
    scale_log2,
    K: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """One program: M query rows of one key-value head against one split of the prefix.

    The last split takes the decision's own keys too.
    """
    tile, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    bg = tl.program_id(2)
    b, group = bg // G, bg % G
    length = tl.load(lengths + b)
    if tile * M >= length * R:
        return
    row_M, t_M, at_M, real_M = rows_of_tile(tile, group, lengths, b, q_h, q_t, R, M)
    at_MK = at_M[:, None] + tl.arange(0, K)[None, :]
    q_MK = tl.load(q + b.to(tl.int64) * q_b + at_MK, mask=real_M[:, None], other=0.0)

    acc_MK = tl.zeros([M, K], tl.float32)
    top_M = tl.full([M], float("-inf"), tl.float32)
    sum_M = tl.zeros([M], tl.float32)
    first, whole, last = split_bounds(prefix_lengths, b, split, splits, P, N)
    for n in tl.range(first, whole, N):
        k_NK = prefix_k.load([b, group, n, 0]).reshape(N, K)
        scores_MN = tl.dot(q_MK, k_NK.T)
        v_NK = prefix_v.load([b, group, n, 0]).reshape(N, K)
        acc_MK, top_M, sum_M = _add_block(acc_MK, top_M, sum_M, scores_MN, v_NK, scale_log2)
    if whole < last:
        k_NK = prefix_k.load([b, group, whole, 0]).reshape(N, K)
        v_NK = prefix_v.load([b, group, whole, 0]).reshape(N, K)
        inside_N = whole + tl.arange(0, N) < last
        scores_MN = tl.where(inside_N[None, :], tl.dot(q_MK, k_NK.T), float("-inf"))
        acc_MK, top_M, sum_M = _add_block(acc_MK, top_M, sum_M, scores_MN, v_NK, scale_log2)
    if split == splits - 1:
        own_k = k + b.to(tl.int64) * k_b + group.to(tl.int64) * k_g
        own_v = v + b.to(tl.int64) * v_b + group.to(tl.int64) * v_g
        for n in tl.range(0, tl.minimum((tile * M + M - 1) // R + 1, length), N, num_stages=1):
            k_NK = block_keys(own_k, n, length, k_t, K, N)
            v_NK = block_keys(own_v, n, length, v_t, K, N)
            seen_MN = (n + tl.arange(0, N))[None, :] <= t_M[:, None]
            scores_MN = tl.where(seen_MN, tl.dot(q_MK, k_NK.T), float("-inf"))
            acc_MK, top_M, sum_M = _add_block(acc_MK, top_M, sum_M, scores_MN, v_NK, scale_log2)

    # A split without keys leaves zeros and a log-sum-exp of minus infinity.
    total_M = tl.where(sum_M > 0.0, sum_M, 1.0)
    into_M = (split * tl.num_programs(2) + bg).to(tl.int64) * T * R + row_M
    into_MK = into_M[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(partial + into_MK, acc_MK / total_M[:, None], mask=real_M[:, None])
    tl.store(partial_lse + into_M, top_M + tl.log2(sum_M), mask=real_M)


@triton.jit
def combine_kernel(
    partial,
    partial_lse,
    lengths,
    out,
    lse,
    o_b,
    o_h,
    o_t,
    T,
    G,
    factor,
    S: tl.constexpr,
    WEIGHTED: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
):
    """Add the partial sums of M rows, weighted by their log-sum-exps, or plainly times `factor`."""
    tile, bg = tl.program_id(0), tl.program_id(1)
    b, group = bg // G, bg % G
    row_M, t_M, at_M, real_M = rows_of_tile(tile, group, lengths, b, o_h, o_t, R, M)
    step = tl.num_programs(1).to(tl.int64) * T * R
    from_M = bg.to(tl.int64) * T * R + row_M
    top_M = tl.full([M], float("-inf"), tl.float32)
    if WEIGHTED:
        for s in tl.static_range(S):
            piece_M = tl.load(partial_lse + s * step + from_M, mask=real_M, other=0.0)
            top_M = tl.maximum(top_M, piece_M)
    sum_M = tl.zeros([M], tl.float32)
    acc_MK = tl.zeros([M, K], tl.float32)
    for s in tl.static_range(S):
        from_MK = (s * step + from_M)[:, None] * K + tl.arange(0, K)[None, :]
        piece_MK = tl.load(partial + from_MK, mask=real_M[:, None], other=0.0)
        if WEIGHTED:
            piece_M = tl.load(partial_lse + s * step + from_M, mask=real_M, other=0.0)
            weight_M = tl.exp2(piece_M - top_M)
            sum_M += weight_M
            acc_MK += piece_MK * weight_M[:, None]
        else:
            acc_MK += piece_MK
    if WEIGHTED:
        acc_MK = acc_MK / sum_M[:, None]
        # Padding gets plus infinity, so that its softmax weights are zero in the backward pass.
        lse_M = tl.where(real_M, top_M + tl.log2(sum_M), float("inf"))
        tl.store(lse + from_M, lse_M, mask=t_M < T)
    into_MK = b.to(tl.int64) * o_b + at_M[:, None] + tl.arange(0, K)[None, :]
    value_MK = tl.where(real_M[:, None], acc_MK * factor, 0.0)
    tl.store(out + into_MK, value_MK.to(out.dtype.element_ty), mask=t_M[:, None] < T)
