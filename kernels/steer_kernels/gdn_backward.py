"""Triton kernel of the gated delta rule, backward, all chunks of a short decision in one launch.

One program walks the chunks from the last to the first with the gradient of its columns of the
state. Queries, keys, decays and betas meet all columns, so that programs leave partial sums of
their gradients, which the caller adds.

Shape letters: as in `gdn_forward`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from steer_kernels.gdn_forward import chunk_decays, load_normalised, load_rows

__all__ = ["backward_kernel"]


@triton.jit
def _unnormalised(d_x_CK, x_CK, factor_C, NORMALISE: tl.constexpr):
    """Turn the gradient of a normalised vector into that of the vector itself."""
    if NORMALISE:
        along_C = tl.sum(d_x_CK * x_CK, 1)
        d_x_CK = (d_x_CK - x_CK * along_C[:, None]) * factor_C[:, None]
    return d_x_CK


@triton.jit
def backward_kernel(
    q,
    k,
    v,
    g,
    beta,
    lengths,
    updates,
    inverses,
    states,
    d_out,
    d_qk,
    d_v,
    d_gates,
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
    """One program: the gradients that F columns of one value head's state give.

    `d_qk` `[2, E / F, B, T, H, K]`, `d_gates` `[2, E / F, B, T, H]` (decay, beta) and `d_v`
    `[B, T, H, E]` are contiguous.
    """
    part, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = part * F
    b, head = bh // H, bh % H
    length, chunks = tl.load(lengths + b), tl.cdiv(T, C)
    i_C, i_K, i_F = tl.arange(0, C), tl.arange(0, K), first + tl.arange(0, F)
    at_KF = i_K[:, None] * E + i_F[None, :]
    below_CC, past_CC = i_C[:, None] > i_C[None, :], i_C[:, None] >= i_C[None, :]
    rows = tl.num_programs(1).to(tl.int64) * T
    second = tl.num_programs(0) * rows
    d_state_KF = tl.zeros([K, F], tl.float32)
    for step in range(chunks):
        chunk = chunks - 1 - step
        t_C = chunk * C + i_C
        real_C = t_C < length
        q_head, k_head = q + b * q_b + head // SHARE * q_h, k + b * k_b + head // SHARE * k_h
        q_CK, q_factor_C = load_normalised(q_head, t_C, real_C, q_t, q_c, K, NORMALISE)
        k_CK, k_factor_C = load_normalised(k_head, t_C, real_C, k_t, k_c, K, NORMALISE)
        v_CF = load_rows(v + b * v_b + head * v_h, t_C, real_C, v_t, v_c, first, F)
        d_read_CF = load_rows(d_out + b * d_b + head * d_h, t_C, real_C, d_t, d_c, first, F) * scale
        g_C = tl.load(g + b * g_b + head * g_h + t_C * g_t, mask=real_C, other=0.0)
        beta_C = tl.load(beta + b * beta_b + head * beta_h + t_C * beta_t, mask=real_C, other=0.0)
        beta_C = beta_C.to(tl.float32)
        update_CF = load_rows(updates + bh * T * E, t_C, real_C, E, 1, first, F)
        at_CC = i_C[:, None] * C + i_C[None, :]
        inverse_CC = tl.load(inverses + (bh * chunks + chunk) * C * C + at_CC)
        state_KF = tl.load(states + (bh * chunks + chunk) * K * E + at_KF)
        sum_C, total, decay_CC = chunk_decays(g_C.to(tl.float32), C)
        fade_C, left_C = tl.exp(sum_C), tl.exp(total - sum_C)

        # o = fade (q S) + reads u
        reads_CC = tl.dot(q_CK, tl.trans(k_CK)) * decay_CC
        d_reads_CC = tl.where(past_CC, tl.dot(d_read_CF, tl.trans(update_CF)), 0.0)
        d_q_CK = tl.dot(d_read_CF, tl.trans(state_KF)) * fade_C[:, None]
        d_sum_C = tl.sum(d_q_CK * q_CK, 1)
        by_decay_CC = d_reads_CC * reads_CC
        d_reads_CC *= decay_CC
        d_q_CK += tl.dot(d_reads_CC, k_CK)
        d_k_CK = tl.dot(tl.trans(d_reads_CC), q_CK)

        # S_next = exp(total) S + kept' u, kept = left k
        d_update_CF = tl.dot(tl.trans(reads_CC), d_read_CF)
        d_update_CF += tl.dot(k_CK * left_C[:, None], d_state_KF)
        d_kept_CK = tl.dot(update_CF, tl.trans(d_state_KF)) * left_C[:, None]
        d_k_CK += d_kept_CK
        d_left_C = tl.sum(d_kept_CK * k_CK, 1)
        d_sum_C -= d_left_C
        d_total = tl.sum(d_left_C, 0) + tl.exp(total) * tl.sum(tl.sum(d_state_KF * state_KF, 1), 0)

        # (I + A) u = beta (v - fade (k S))
        d_right_CF = tl.dot(tl.trans(inverse_CC), d_update_CF)
        d_weights_CC = tl.where(below_CC, -tl.dot(d_right_CF, tl.trans(update_CF)), 0.0) * decay_CC
        faded_CF = d_right_CF * fade_C[:, None]
        known_CK = tl.dot(faded_CF, tl.trans(state_KF))
        known_C = tl.sum(known_CK * k_CK, 1)
        d_beta_C = tl.sum(d_right_CF * v_CF, 1) - known_C
        d_sum_C -= beta_C * known_C
        d_k_CK -= known_CK * beta_C[:, None]

        # A = beta (k k') decay
        by_beta_CC = d_weights_CC * tl.dot(k_CK, tl.trans(k_CK))
        d_beta_C += tl.sum(by_beta_CC, 1)
        by_decay_CC += by_beta_CC * beta_C[:, None]
        d_sum_C += tl.sum(by_decay_CC, 1) - tl.sum(by_decay_CC, 0)
        d_weights_CC *= beta_C[:, None]
        d_k_CK += tl.dot(d_weights_CC + tl.trans(d_weights_CC), k_CK)

        d_state_KF = d_state_KF * tl.exp(total)
        d_state_KF += tl.dot(tl.trans(q_CK), d_read_CF * fade_C[:, None])
        d_state_KF -= tl.dot(tl.trans(k_CK), faded_CF * beta_C[:, None])

        inside_C = t_C < T
        at_C = part * rows + (b * T + t_C) * H + head
        at_CK = at_C[:, None] * K + i_K[None, :]
        d_q_CK = _unnormalised(d_q_CK, q_CK, q_factor_C, NORMALISE)
        d_k_CK = _unnormalised(d_k_CK, k_CK, k_factor_C, NORMALISE)
        # A padded position reads no key, but the decays' sums reach it.
        d_g_C = tl.where(real_C, tl.cumsum(d_sum_C, 0, reverse=True) + d_total, 0.0)
        tl.store(d_qk + at_CK, d_q_CK, mask=inside_C[:, None])
        tl.store(d_qk + second * K + at_CK, d_k_CK, mask=inside_C[:, None])
        tl.store(d_gates + at_C, d_g_C, mask=inside_C)
        tl.store(d_gates + second + at_C, d_beta_C, mask=inside_C)
        at_CF = ((b * T + t_C[:, None]) * H + head) * E + i_F[None, :]
        d_v_CF = (d_right_CF * beta_C[:, None]).to(d_v.dtype.element_ty)
        tl.store(d_v + at_CF, d_v_CF, mask=inside_C[:, None])
