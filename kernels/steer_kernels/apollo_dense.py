"""Kernels of APOLLO where the gradient is in memory, and of AdamW for what is not projected.

Two passes: `project` reads G once for R, the moments and the channels' norms; `move` reads it
again and moves W. Between them `apollo_parts.finish` is one program for each matrix. At bfloat16
and R / S = 1 / 16 that is 2 + 1 (moments) and 2 + 4 bytes a parameter, 9 in all.

Shape letters: M x N a weight, C = max(M, N) channels, S = min(M, N), R the rank.
"""

from __future__ import annotations

import triton
import triton.language as tl

from steer_kernels.apollo_parts import (
    address,
    advance_in_pieces,
    moved,
    product,
    random_words,
    turn_of,
)

__all__ = ["move", "move_adamw", "project"]


@triton.jit
def project(
    table,
    signs,
    scalings,
    sums_q,
    sums_r,
    sums_u,
    dials,
    C,
    S,
    stride_c,
    stride_s,
    root,
    new1,
    keep2,
    new2,
    eps,
    RANK: tl.constexpr,
    GRAD: tl.constexpr,
    BITS: tl.constexpr,
    TENSOR: tl.constexpr,
    COMPAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Project ROWS channels, advance their moments, and store their scaling.

    BITS is the integer of G's width.
    """
    block, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    # As integers, because Triton 3.6 on Hopper overwrites a tile of numbers with two uses while the
    # product still reads it; of integers, the product takes a copy in registers.
    G = address(table, matrix, 1, BITS)
    m, v = address(table, matrix, 2, tl.float32), address(table, matrix, 3, tl.float32)
    c = block * ROWS + tl.arange(0, ROWS)
    r = tl.arange(0, COLUMNS)
    R_CR = tl.zeros((ROWS, COLUMNS), tl.float32)
    # Summed over the rows at the end: a sum in the loop would exchange numbers between threads.
    square_CS = tl.zeros((ROWS, STEP), tl.float32)
    for begin in range(0, S, STEP):
        k = begin + tl.arange(0, STEP)
        bits_CS = tl.load(
            G + (c[:, None] * stride_c + k[None, :] * stride_s),
            mask=(c < C)[:, None] & (k < S)[None, :],
            other=0,
        )
        signs_SR = tl.load(
            signs + k[:, None] * RANK + r[None, :],
            mask=(k < S)[:, None] & (r < RANK)[None, :],
            other=0.0,
        )
        G_CS = bits_CS.to(GRAD, bitcast=True)
        wide_CS = G_CS.to(tl.float32)
        square_CS += wide_CS * wide_CS
        R_CR = product(G_CS, signs_SR.to(GRAD), R_CR)
    square_C = tl.sum(square_CS, axis=1)
    q_C, r_C = advance_in_pieces(
        R_CR * root, m, v, c, 0, C, dials, new1, keep2, new2, eps,
        RANK, ROWS, COLUMNS, 32, COMPAT,
    )  # fmt: skip
    scaling_C = tl.sqrt(q_C) / (tl.sqrt(r_C) + 1e-8)
    if not TENSOR:
        tl.store(scalings + matrix * C + c, scaling_C, mask=c < C)
        square_C *= scaling_C * scaling_C
    place = matrix * tl.num_programs(0) + block
    tl.store(sums_q + place, tl.sum(q_C, axis=0))
    tl.store(sums_r + place, tl.sum(r_C, axis=0))
    tl.store(sums_u + place, tl.sum(square_C, axis=0))


@triton.jit
def _moved(
    W,
    G,
    row,
    column,
    M,
    N,
    w_row,
    w_column,
    g_row,
    g_column,
    scalings,
    factor,
    decay,
    noise,
    WEIGHT: tl.constexpr,
    TALL: tl.constexpr,
    TENSOR: tl.constexpr,
    COMPAT: tl.constexpr,
):
    mask = (row < M)[:, None] & (column < N)[None, :]
    far, wide = row[:, None], column[None, :]
    w_place = W + (far * w_row + wide * w_column)
    G_MN = tl.load(G + (far * g_row + wide * g_column), mask=mask, other=0.0)
    W_MN = tl.load(w_place, mask=mask, other=0.0)
    if TENSOR:
        update_MN = G_MN.to(tl.float32) * factor
    elif TALL:
        scaling = tl.load(scalings + row, mask=row < M, other=0.0) * factor
        update_MN = G_MN.to(tl.float32) * scaling[:, None]
    else:
        scaling = tl.load(scalings + column, mask=column < N, other=0.0) * factor
        update_MN = G_MN.to(tl.float32) * scaling[None, :]
    tl.store(w_place, moved(W_MN, update_MN, decay, noise, WEIGHT, COMPAT), mask=mask)


@triton.jit
def move(
    table,
    scalings,
    factors,
    dials,
    M,
    N,
    w_row,
    w_column,
    g_row,
    g_column,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    TALL: tl.constexpr,
    TENSOR: tl.constexpr,
    COMPAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Move ROWS rows of W and the ROWS rows 64 below them, which share their random words."""
    matrix = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(N, COLUMNS)
    tile = tl.program_id(0)
    down = tile // across
    column = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)
    group, inside = down // (64 // ROWS), (down % (64 // ROWS)) * ROWS + tl.arange(0, ROWS)
    counter = (group * 64 + inside)[:, None] * N + column[None, :]
    key = tl.load(table + matrix * 7 + 5).to(tl.int32)
    words = random_words(counter, key, turn_of(dials))
    W, G = address(table, matrix, 0, WEIGHT), address(table, matrix, 1, GRAD)
    scalings += matrix * (M if TALL else N)
    factor, decay = tl.load(factors + matrix), tl.load(dials + 1)
    row = group * 128 + inside
    _moved(
        W, G, row, column, M, N, w_row, w_column, g_row, g_column, scalings, factor, decay,
        words & 0xFFFF, WEIGHT, TALL, TENSOR, COMPAT,
    )  # fmt: skip
    _moved(
        W, G, row + 64, column, M, N, w_row, w_column, g_row, g_column, scalings, factor, decay,
        words >> 16, WEIGHT, TALL, TENSOR, COMPAT,
    )  # fmt: skip


@triton.jit
def _adamw_block(
    table, matrix, begin, limit, dials, new1, keep2, new2, eps,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, COMPAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = begin + tl.arange(0, BLOCK)
    mask = place < limit
    weight = address(table, matrix, 0, WEIGHT) + place
    m = address(table, matrix, 2, tl.float32) + place
    v = address(table, matrix, 3, tl.float32) + place
    grad = tl.load(address(table, matrix, 1, GRAD) + place, mask=mask, other=0.0).to(tl.float32)
    first, second = tl.load(m, mask=mask, other=0.0), tl.load(v, mask=mask, other=0.0)
    first += (grad - first) * new1
    second = second * keep2 + grad * grad * new2
    tl.store(m, first, mask=mask)
    tl.store(v, second, mask=mask)
    correct1, correct2, decay = tl.load(dials + 2), tl.load(dials + 3), tl.load(dials + 1)
    value = tl.load(weight, mask=mask, other=0.0)
    if COMPAT:
        update = tl.load(dials) * (correct2 / correct1) * first / (tl.sqrt(second) + eps)
    else:
        update = tl.load(dials) * first / ((tl.sqrt(second) / correct2 + eps) * correct1)
    key = tl.load(table + matrix * 7 + 5).to(tl.int32)
    noise = random_words(place.to(tl.uint32), key, turn_of(dials)) & 0xFFFF
    tl.store(weight, moved(value, update, decay, noise, WEIGHT, COMPAT), mask=mask)


@triton.jit
def move_adamw(
    table, sizes, dials, new1, keep2, new2, eps,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, COMPAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take AdamW's step on BLOCK elements of one contiguous weight."""
    matrix = tl.program_id(1).to(tl.int64)
    size = tl.load(sizes + matrix)
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    # A limit that is known to be a multiple of BLOCK lets the loads be of 16 bytes each.
    if begin + BLOCK <= size:
        _adamw_block(
            table, matrix, begin, begin + BLOCK, dials, new1, keep2, new2, eps,
            WEIGHT, GRAD, COMPAT, BLOCK,
        )  # fmt: skip
    elif begin < size:
        _adamw_block(
            table, matrix, begin, size, dials, new1, keep2, new2, eps, WEIGHT, GRAD, COMPAT, BLOCK
        )
