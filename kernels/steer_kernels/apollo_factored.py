"""Kernels of APOLLO where the gradient `G = dY^T X` of D tokens is never formed.

Let A [D, C] be the factor on the channels' side and B [D, S] the other (dY and X where M >= N):

    R = A^T (B P^T)                      `shrink`, then `project_factored`
    ||diag(s) G||^2 = <B B^T, A diag(s^2) A^T>      `norm_factored`
    W = W (1 - lr wd) - lr s (dY^T X)    `move_factored`: one product, written over W

W is read and written once: 4 bytes a parameter in bfloat16, beside the moments and the factors.

Shape letters: M x N a weight, C = max(M, N) channels, S = min(M, N), R the rank, D tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from steer_kernels.apollo_parts import (
    address,
    advance,
    moments,
    moved,
    product,
    random_words,
    turn_of,
)

__all__ = ["move_factored", "norm_factored", "project_factored", "shrink"]


@triton.jit
def shrink(
    table,
    signs,
    Z,
    D,
    S,
    stride_b,
    B_FIELD: tl.constexpr,
    RANK: tl.constexpr,
    FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Store `Z = B signs` `[D, COLUMNS]` of one matrix."""
    matrix = tl.program_id(1).to(tl.int64)
    B = address(table, matrix, B_FIELD, FACTOR)
    d, r = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    Z_DR = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, S, STEP):
        k = begin + tl.arange(0, STEP)
        B_DS = tl.load(
            B + (d[:, None] * stride_b + k[None, :]),
            mask=(d < D)[:, None] & (k < S)[None, :],
            other=0.0,
        )
        signs_SR = tl.load(
            signs + k[:, None] * RANK + r[None, :],
            mask=(k < S)[:, None] & (r < RANK)[None, :],
            other=0.0,
        )
        Z_DR = product(B_DS, signs_SR.to(FACTOR), Z_DR)
    place = (matrix * D + d)[:, None] * COLUMNS + r[None, :]
    tl.store(Z + place, Z_DR.to(FACTOR), mask=(d < D)[:, None])


@triton.jit
def project_factored(
    table,
    Z,
    scalings,
    sums_q,
    sums_r,
    dials,
    C,
    D,
    stride_a,
    root,
    new1,
    keep2,
    new2,
    eps,
    A_FIELD: tl.constexpr,
    RANK: tl.constexpr,
    FACTOR: tl.constexpr,
    COMPAT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Make R of ROWS channels from A and Z `[D, WIDTH]`, advance their moments, and store their
    scaling; COLUMNS of R at a time."""
    block, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    A = address(table, matrix, A_FIELD, FACTOR)
    m, v = address(table, matrix, 2, tl.float32), address(table, matrix, 3, tl.float32)
    Z += matrix * D * WIDTH
    c = block * ROWS + tl.arange(0, ROWS)
    q_C = tl.zeros((ROWS,), tl.float32)
    r_C = tl.zeros((ROWS,), tl.float32)
    for begin in range(0, RANK, COLUMNS):
        r = begin + tl.arange(0, COLUMNS)
        # Asked for before the product, so that they arrive meanwhile.
        place, mask, first_CR, second_CR = moments(m, v, c, r, C, RANK)
        R_CR = tl.zeros((ROWS, COLUMNS), tl.float32)
        for token in range(0, D, STEP):
            d = token + tl.arange(0, STEP)
            A_CD = tl.load(
                A + (d[None, :] * stride_a + c[:, None]),
                mask=(c < C)[:, None] & (d < D)[None, :],
                other=0.0,
            )
            Z_DR = tl.load(Z + (d[:, None] * WIDTH + r[None, :]), mask=(d < D)[:, None], other=0.0)
            R_CR = product(A_CD, Z_DR, R_CR)
        q_some, r_some = advance(
            R_CR * root, place, mask, first_CR, second_CR, m, v, dials, new1, keep2, new2, eps,
            COMPAT,
        )  # fmt: skip
        q_C += q_some
        r_C += r_some
    tl.store(scalings + matrix * C + c, tl.sqrt(q_C) / (tl.sqrt(r_C) + 1e-8), mask=c < C)
    place = matrix * tl.num_programs(0) + block
    tl.store(sums_q + place, tl.sum(q_C, axis=0))
    tl.store(sums_r + place, tl.sum(r_C, axis=0))


@triton.jit
def norm_factored(
    table,
    scalings,
    sums_u,
    C,
    S,
    D,
    stride_a,
    stride_b,
    A_FIELD: tl.constexpr,
    B_FIELD: tl.constexpr,
    FACTOR: tl.constexpr,
    TENSOR: tl.constexpr,
    SIDE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Store one tile's share of `<B B^T, A diag(s^2) A^T>`; both are symmetric."""
    tile, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    across = tl.cdiv(D, SIDE)
    upper, lower = tile // across, tile % across
    share = 0.0
    if lower >= upper:
        A = address(table, matrix, A_FIELD, FACTOR)
        B = address(table, matrix, B_FIELD, FACTOR)
        d, e = upper * SIDE + tl.arange(0, SIDE), lower * SIDE + tl.arange(0, SIDE)
        far_d, far_e = d[:, None], e[None, :]
        BB = tl.zeros((SIDE, SIDE), tl.float32)
        for begin in range(0, S, STEP):
            k = begin + tl.arange(0, STEP)
            left = tl.load(
                B + (far_d * stride_b + k[None, :]),
                mask=(d < D)[:, None] & (k < S)[None, :],
                other=0.0,
            )
            right = tl.load(
                B + (far_e * stride_b + k[:, None]),
                mask=(e < D)[None, :] & (k < S)[:, None],
                other=0.0,
            )
            BB = product(left, right, BB)
        AA = tl.zeros((SIDE, SIDE), tl.float32)
        for begin in range(0, C, STEP):
            c = begin + tl.arange(0, STEP)
            left = tl.load(
                A + (far_d * stride_a + c[None, :]),
                mask=(d < D)[:, None] & (c < C)[None, :],
                other=0.0,
            )
            right = tl.load(
                A + (far_e * stride_a + c[:, None]),
                mask=(e < D)[None, :] & (c < C)[:, None],
                other=0.0,
            )
            if not TENSOR:
                s = tl.load(scalings + matrix * C + c, mask=c < C, other=0.0)
                left = (left.to(tl.float32) * (s * s)[None, :]).to(FACTOR)
            AA = product(left, right, AA)
        share = tl.sum(tl.sum(BB * AA, axis=1), axis=0)
        if lower > upper:
            share = share * 2
    tl.store(sums_u + matrix * tl.num_programs(0) + tile, share)


@triton.jit
def move_factored(
    table,
    scalings,
    factors,
    dials,
    M,
    N,
    D,
    w_row,
    w_column,
    stride_x,
    stride_y,
    WEIGHT: tl.constexpr,
    FACTOR: tl.constexpr,
    TALL: tl.constexpr,
    TENSOR: tl.constexpr,
    COMPAT: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Move 128 rows of W by COLUMNS; two accumulators, because rows 64 apart share random words.

    W is asked for before the product, so that it arrives meanwhile.
    """
    matrix = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(N, COLUMNS)
    group, column = tl.program_id(0) // across, tl.program_id(0) % across
    column = column * COLUMNS + tl.arange(0, COLUMNS)
    inside = tl.arange(0, 64)
    row = group * 128 + inside
    below = row + 64
    W = address(table, matrix, 0, WEIGHT)
    high_place = W + (row[:, None] * w_row + column[None, :] * w_column)
    low_place = W + (below[:, None] * w_row + column[None, :] * w_column)
    high_mask = (row < M)[:, None] & (column < N)[None, :]
    low_mask = (below < M)[:, None] & (column < N)[None, :]
    W_high = tl.load(high_place, mask=high_mask, other=0.0)
    W_low = tl.load(low_place, mask=low_mask, other=0.0)
    X, Y = address(table, matrix, 1, FACTOR), address(table, matrix, 6, FACTOR)
    high = tl.zeros((64, COLUMNS), tl.float32)
    low = tl.zeros((64, COLUMNS), tl.float32)
    for begin in range(0, D, STEP):
        d = begin + tl.arange(0, STEP)
        X_DN = tl.load(
            X + (d[:, None] * stride_x + column[None, :]),
            mask=(d < D)[:, None] & (column < N)[None, :],
            other=0.0,
        )
        Y_high = tl.load(
            Y + (d[None, :] * stride_y + row[:, None]),
            mask=(row < M)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        Y_low = tl.load(
            Y + (d[None, :] * stride_y + below[:, None]),
            mask=(below < M)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        high = product(Y_high, X_DN, high)
        low = product(Y_low, X_DN, low)
    key = tl.load(table + matrix * 7 + 5).to(tl.int32)
    words = random_words((group * 64 + inside)[:, None] * N + column[None, :], key, turn_of(dials))
    scalings += matrix * (M if TALL else N)
    factor, decay = tl.load(factors + matrix), tl.load(dials + 1)
    if TENSOR:
        s_high, s_low = factor, factor
    elif TALL:
        s_high = (tl.load(scalings + row, mask=row < M, other=0.0) * factor)[:, None]
        s_low = (tl.load(scalings + below, mask=below < M, other=0.0) * factor)[:, None]
    else:
        s_high = (tl.load(scalings + column, mask=column < N, other=0.0) * factor)[None, :]
        s_low = s_high
    new_high = moved(W_high, high * s_high, decay, words & 0xFFFF, WEIGHT, COMPAT)
    new_low = moved(W_low, low * s_low, decay, words >> 16, WEIGHT, COMPAT)
    tl.store(high_place, new_high, mask=high_mask)
    tl.store(low_place, new_low, mask=low_mask)
