"""Triton kernels of the gated delta rule, backward: the chain first, then what stands alone.

The gradient of the state goes from the last chunk to the first, `dS` being that after a chunk:

    du = reads' do + keys dS          dS <- exp(G_C) dS + queries' do - W' du

With `dS` and `du` of every chunk in memory, all other gradients are found by all chunks at the same
time.

Shape letters and names: as in `gdn_forward`.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# A kernel is written in Triton's language, in which ranges and pointer types mean something else.
from __future__ import annotations

import triton
import triton.language as tl

from steer_kernels.gdn_forward import chunk_decays, load_gates, load_normalised, load_rows

__all__ = ["chain_backward_kernel", "gradient_kernel"]


@triton.jit
def chain_backward_kernel(
    d_out,
    lengths,
    queries,
    keys,
    weights,
    reads,
    fades,
    d_updates,
    d_states,
    d_b,
    d_t,
    d_h,
    d_c,
    H,
    chunks,
    K: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
):
    """One program: the gradient of F columns of one value head's state, through all chunks.

    `d_updates` = du `[B, H, P, E]` and `d_states` = dS `[B, H, chunks, K, E]` are contiguous.
    """
    first, bh = tl.program_id(0) * F, tl.program_id(1).to(tl.int64)
    b, head = bh // H, bh % H
    kind: tl.constexpr = weights.dtype.element_ty
    length = tl.load(lengths + b)
    i_C, i_K, i_F = tl.arange(0, C), tl.arange(0, K), first + tl.arange(0, F)
    at_KF = i_K[:, None] * E + i_F[None, :]
    at_CC, at_CK = i_C[None, :] * C + i_C[:, None], i_C[:, None] * K + i_K[None, :]
    at_KC, at_CF = i_K[:, None] + i_C[None, :] * K, i_C[:, None] * E + i_F[None, :]
    d_state_KF = tl.zeros([K, F], tl.float32)
    for step in range(chunks):
        chunk = chunks - 1 - step
        at, t_C = bh * chunks + chunk, chunk * C + i_C
        reads_CC = tl.load(reads + at * C * C + at_CC)
        keys_CK = tl.load(keys + at * C * K + at_CK)
        queries_KC = tl.load(queries + at * C * K + at_KC)
        weights_KC = tl.load(weights + at * C * K + at_KC)
        d_head = d_out + b * d_b + head * d_h
        d_out_CF = load_rows(d_head, t_C, t_C < length, d_t, d_c, first, F).to(kind)
        held_KF = d_state_KF.to(kind)
        tl.store(d_states + at * K * E + at_KF, held_KF)
        d_update_CF = tl.dot(reads_CC, d_out_CF) + tl.dot(keys_CK, held_KF)
        d_update_CF = d_update_CF.to(kind)
        tl.store(d_updates + at * C * E + at_CF, d_update_CF)
        d_state_KF = d_state_KF * tl.load(fades + at) + tl.dot(queries_KC, d_out_CF)
        d_state_KF -= tl.dot(weights_KC, d_update_CF)


@triton.jit
def _unnormalised(d_x_CK, x_CK, factor_C, NORMALISE: tl.constexpr):
    """Turn the gradient of a normalised vector into that of the vector itself."""
    if NORMALISE:
        along_C = tl.sum(d_x_CK * x_CK, 1)
        d_x_CK = (d_x_CK - x_CK * along_C[:, None]) * factor_C[:, None]
    return d_x_CK


@triton.jit
def gradient_kernel(
    q,
    k,
    v,
    g,
    beta,
    d_out,
    lengths,
    reads,
    inverses,
    updates,
    states,
    d_updates,
    d_states,
    d_q,
    d_k,
    d_v,
    d_g,
    d_beta,
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
    d_b,
    d_t,
    d_h,
    d_c,
    T,
    H,
    scale,
    SHARE: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    """One program: the gradients that one chunk of one value head gives, F columns at a time.

    `d_q`, `d_k` `[B, T, H, K]`, `d_v` `[B, T, H, E]`, `d_g` and `d_beta` `[B, T, H]` are contiguous.
    """
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, head, at = bh // H, bh % H, bh * tl.num_programs(0) + chunk
    i_C, i_K, i_F = tl.arange(0, C), tl.arange(0, K), tl.arange(0, F)
    t_C = chunk * C + i_C
    kind: tl.constexpr = reads.dtype.element_ty
    real_C, inside_C = t_C < tl.load(lengths + b), t_C < T
    v_head, d_head = v + b * v_b + head * v_h, d_out + b * d_b + head * d_h
    at_CC = (at * C + i_C[:, None]) * C + i_C[None, :]
    at_C = (b * T + t_C) * H + head
    beta_C = load_gates(beta + b * beta_b + head * beta_h, t_C, real_C, beta_t)
    g_C = load_gates(g + b * g_b + head * g_h, t_C, real_C, g_t)
    sum_C, total, decay_CC = chunk_decays(g_C, C)
    fade_C, left_C = tl.exp(sum_C), tl.exp(total - sum_C)
    turned_CC = tl.trans(tl.load(inverses + at_CC))

    d_reads_CC = tl.zeros([C, C], tl.float32)
    d_pairs_CC = tl.zeros([C, C], tl.float32)
    d_q_CK = tl.zeros([C, K], tl.float32)
    known_CK = tl.zeros([C, K], tl.float32)
    d_kept_CK = tl.zeros([C, K], tl.float32)
    d_beta_C = tl.zeros([C], tl.float32)
    d_total = 0.0
    for first in range(0, E, F):
        at_CF = (at * C + i_C[:, None]) * E + first + i_F[None, :]
        at_KF = (at * K + i_K[:, None]) * E + first + i_F[None, :]
        state_KF, d_state_KF = tl.load(states + at_KF), tl.load(d_states + at_KF)
        update_CF = tl.load(updates + at_CF).to(kind)
        d_out_CF = load_rows(d_head, t_C, real_C, d_t, d_c, first, F).to(kind)
        # o = queries S + reads u
        d_reads_CC += tl.dot(d_out_CF, tl.trans(update_CF))
        d_q_CK += tl.dot(d_out_CF, tl.trans(state_KF))
        # S_next = exp(total) S + keys' u
        d_kept_CK += tl.dot(update_CF, tl.trans(d_state_KF))
        d_total += tl.sum(tl.sum(state_KF.to(tl.float32) * d_state_KF.to(tl.float32), 1), 0)
        # (I + A) u = beta (v - fade (k S))
        d_right_CF = tl.dot(turned_CC, tl.load(d_updates + at_CF))
        right_CF = d_right_CF.to(kind)
        d_pairs_CC -= tl.dot(right_CF, tl.trans(update_CF))
        known_CK += tl.dot(right_CF, tl.trans(state_KF))
        v_CF = load_rows(v_head, t_C, real_C, v_t, v_c, first, F)
        d_beta_C += tl.sum(d_right_CF * v_CF, 1)
        d_v_CF = (d_right_CF * beta_C[:, None]).to(d_v.dtype.element_ty)
        at_v = at_C[:, None] * E + first + i_F[None, :]
        tl.store(d_v + at_v, d_v_CF, mask=inside_C[:, None])

    q_head, k_head = q + b * q_b + head // SHARE * q_h, k + b * k_b + head // SHARE * k_h
    q_CK, q_factor_C = load_normalised(q_head, t_C, real_C, q_t, q_c, K, NORMALISE)
    k_CK, k_factor_C = load_normalised(k_head, t_C, real_C, k_t, k_c, K, NORMALISE)
    q_kind_CK, k_kind_CK = q_CK.to(kind), k_CK.to(kind)
    past_CC, below_CC = i_C[:, None] >= i_C[None, :], i_C[:, None] > i_C[None, :]
    d_reads_CC = tl.where(past_CC, d_reads_CC, 0.0)
    by_decay_CC = d_reads_CC * tl.load(reads + at_CC).to(tl.float32)
    d_reads_CC = (d_reads_CC * decay_CC * scale).to(kind)
    d_q_CK *= (fade_C * scale)[:, None]
    d_sum_C = tl.sum(d_q_CK * q_CK, 1)
    d_q_CK += tl.dot(d_reads_CC, k_kind_CK)
    d_q_CK = _unnormalised(d_q_CK, q_CK, q_factor_C, NORMALISE)
    at_CK = at_C[:, None] * K + i_K[None, :]
    tl.store(d_q + at_CK, d_q_CK.to(d_q.dtype.element_ty), mask=inside_C[:, None])

    d_k_CK = d_kept_CK * left_C[:, None]
    d_left_C = tl.sum(d_k_CK * k_CK, 1)
    known_CK *= fade_C[:, None]
    known_C = tl.sum(known_CK * k_CK, 1)
    d_beta_C -= known_C
    d_sum_C -= d_left_C + beta_C * known_C
    d_k_CK -= known_CK * beta_C[:, None]
    d_k_CK += tl.dot(tl.trans(d_reads_CC), q_kind_CK)
    # A = beta (k k') decay
    d_pairs_CC = tl.where(below_CC, d_pairs_CC, 0.0) * decay_CC
    by_beta_CC = d_pairs_CC * tl.dot(k_kind_CK, tl.trans(k_kind_CK))
    d_beta_C += tl.sum(by_beta_CC, 1)
    by_decay_CC += by_beta_CC * beta_C[:, None]
    d_sum_C += tl.sum(by_decay_CC, 1) - tl.sum(by_decay_CC, 0)
    d_pairs_CC *= beta_C[:, None]
    d_k_CK += tl.dot((d_pairs_CC + tl.trans(d_pairs_CC)).to(kind), k_kind_CK)
    d_k_CK = _unnormalised(d_k_CK, k_CK, k_factor_C, NORMALISE)
    tl.store(d_k + at_CK, d_k_CK.to(d_k.dtype.element_ty), mask=inside_C[:, None])

    d_total = d_total * tl.exp(total) + tl.sum(d_left_C, 0)
    # A padded position reads no key, but the decays' sums reach it.
    d_g_C = tl.where(real_C, tl.cumsum(d_sum_C, 0, reverse=True) + d_total, 0.0)
    tl.store(d_g + at_C, d_g_C.to(d_g.dtype.element_ty), mask=inside_C)
    tl.store(d_beta + at_C, d_beta_C.to(d_beta.dtype.element_ty), mask=inside_C)
