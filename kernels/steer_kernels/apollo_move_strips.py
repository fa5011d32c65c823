"""`apollo_factored.move_factored` for few tokens and even shapes: one read of Y for many columns.

A program takes 128 rows of W by SPAN tiles of COLUMNS. Y of its rows stays in shared memory while W
and X of the tiles to come are copied there, STAGES at a time; nothing is masked but tokens that do
not exist. The caller sees to it that M is a multiple of 128 and N one of COLUMNS.

Shape letters: M x N a weight, D tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from steer_kernels.apollo_parts import address, moved, product, random_words, turn_of

__all__ = ["move_strips"]


@triton.jit
def _tokens(places, d, D, FULL: tl.constexpr, AXIS: tl.constexpr):
    """Return a factor's tile; tokens from D on are zeros."""
    if FULL:
        tile = tl.load(places)
    else:
        tile = tl.load(places, mask=tl.expand_dims(d < D, AXIS), other=0.0)
    return tile


@triton.jit
def move_strips(
    table, scalings, factors, dials, M, N, D, w_row, stride_x, stride_y, chunks,
    TALL: tl.constexpr, TENSOR: tl.constexpr, COMPAT: tl.constexpr,
    DEPTH: tl.constexpr, FULL: tl.constexpr,
    COLUMNS: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Move 128 rows of W by SPAN times COLUMNS; DEPTH is D or more, and D where FULL."""
    matrix = tl.program_id(1).to(tl.int64)
    group, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    inside = tl.arange(0, 64)
    row = group * 128 + inside
    below = row + 64
    d = tl.arange(0, DEPTH)
    W = address(table, matrix, 0, tl.bfloat16)
    X, Y = address(table, matrix, 1, tl.bfloat16), address(table, matrix, 6, tl.bfloat16)
    Y_high = _tokens(Y + (d[None, :] * stride_y + row[:, None]), d, D, FULL, 0)
    Y_low = _tokens(Y + (d[None, :] * stride_y + below[:, None]), d, D, FULL, 0)
    key, turn = tl.load(table + matrix * 7 + 5).to(tl.int32), turn_of(dials)
    scalings += matrix * (M if TALL else N)
    factor, decay = tl.load(factors + matrix), tl.load(dials + 1)
    if TALL and not TENSOR:
        of_high = (tl.load(scalings + row) * factor)[:, None]
        of_low = (tl.load(scalings + below) * factor)[:, None]
    else:
        of_high, of_low = factor, factor
    first = chunk * SPAN * COLUMNS
    last = tl.minimum(first + SPAN * COLUMNS, N)
    for begin in tl.range(first, last, COLUMNS, num_stages=STAGES):
        column = begin + tl.arange(0, COLUMNS)
        high_place = W + (row[:, None] * w_row + column[None, :])
        low_place = W + (below[:, None] * w_row + column[None, :])
        W_high, W_low = tl.load(high_place), tl.load(low_place)
        X_DN = _tokens(X + (d[:, None] * stride_x + column[None, :]), d, D, FULL, 1)
        zero = tl.zeros((64, COLUMNS), tl.float32)
        high, low = product(Y_high, X_DN, zero), product(Y_low, X_DN, zero)
        words = random_words((group * 64 + inside)[:, None] * N + column[None, :], key, turn)
        if TALL or TENSOR:
            s_high, s_low = of_high, of_low
        else:
            s_high = (tl.load(scalings + column) * factor)[None, :]
            s_low = s_high
        new_high = moved(W_high, high * s_high, decay, words & 0xFFFF, tl.bfloat16, COMPAT)
        new_low = moved(W_low, low * s_low, decay, words >> 16, tl.bfloat16, COMPAT)
        tl.store(high_place, new_high)
        tl.store(low_place, new_low)
