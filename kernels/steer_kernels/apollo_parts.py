"""What the kernels of APOLLO have in common: random words, rounding, moments, the limiter.

A table holds a row of seven int64 numbers for each matrix, most of them addresses, so that one
launch moves all matrices of one shape:

    0 weight    1 gradient, or X    2 m    3 v    4 norm    5 key    6 dY

Shape letters: C channels, S the other side, R the rank.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# A kernel is written in Triton's language, in which ranges and pointer types mean something else.
from __future__ import annotations

import os

import triton
import triton.language as tl

__all__ = [
    "address",
    "advance",
    "advance_in_pieces",
    "finish",
    "moments",
    "moved",
    "product",
    "random_words",
    "rounded",
    "turn_of",
]

# The interpreter multiplies bfloat16 by its bits, and takes float32 instead.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def address(table, matrix, field: tl.constexpr, DTYPE: tl.constexpr):
    """Return a pointer of a matrix's row; the launcher sees to it that it is aligned."""
    number = tl.load(table + matrix * 7 + field)
    # Without the promise, every load would be of one element.
    return tl.multiple_of(number.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def product(left, right, total):
    """Return `left right + total`, accurate for float32 too."""
    if INTERPRETED:
        result = tl.dot(left.to(tl.float32), right.to(tl.float32), total)
    else:
        result = tl.dot(left, right, total, input_precision="tf32x3")
    return result


@triton.jit
def random_words(counter, key, turn):
    """Return 32 random bits for each counter: `workbench.train.rounding.random_words`."""
    x = counter.to(tl.uint32) + key.to(tl.uint32)
    x = (x ^ (x >> 17)) * 0xED5AD4BB
    x = ((x ^ (x >> 11)) + turn.to(tl.uint32)) * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    return x ^ (x >> 14)


@triton.jit
def turn_of(dials):
    """Return the key of the step, which two float32 dials carry in halves."""
    low = tl.load(dials + 4).to(tl.int32)
    high = tl.load(dials + 5).to(tl.int32)
    return low.to(tl.uint32) | (high.to(tl.uint32) << 16)


@triton.jit
def rounded(value, noise, dtype: tl.constexpr):
    """Return float32 values in the weights' dtype, bfloat16 by the 16-bit `noise`."""
    if dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        # Infinities and NaN take no noise: a GPU's NaN is 0x7fffffff and would become -0.
        bits = tl.where(tl.abs(value) < float("inf"), bits + noise, bits)
        result = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(dtype)
    return result


@triton.jit
def moved(W_MN, update_MN, decay, noise, WEIGHT: tl.constexpr, COMPAT: tl.constexpr):
    """Return weights less their update, decayed by the factor `decay`; rounded as `rounded` does."""
    W_MN = W_MN.to(tl.float32)
    if COMPAT:
        W_MN = (W_MN - update_MN) * decay
    else:
        W_MN = W_MN * decay - update_MN
    return rounded(W_MN, noise, WEIGHT)


@triton.jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the left and the right half of a tile; each thread keeps what it has."""
    x = tl.reshape(x, (ROWS, 2, COLUMNS // 2))
    return tl.split(tl.permute(x, (0, 2, 1)))


@triton.jit
def moments(m, v, c, r, C, RANK: tl.constexpr):
    """Return where moments of channels `c` and columns `r` lie, which of them exist, and both."""
    place = c[:, None] * RANK + r[None, :]
    mask = (c < C)[:, None] & (r < RANK)[None, :]
    first_CR = tl.load(m + place, mask=mask, other=0.0)
    return place, mask, first_CR, tl.load(v + place, mask=mask, other=0.0)


@triton.jit
def advance(
    R_CR, place, mask, first_CR, second_CR, m, v, dials, new1, keep2, new2, eps,
    COMPAT: tl.constexpr,
):  # fmt: skip
    """Advance the moments of a tile; return its channels' shares of the squares of Q and R."""
    first_CR += (R_CR - first_CR) * new1
    second_CR = second_CR * keep2 + R_CR * R_CR * new2
    tl.store(m + place, first_CR, mask=mask)
    tl.store(v + place, second_CR, mask=mask)
    if COMPAT:
        Q_CR = first_CR / (tl.sqrt(second_CR) + eps)
    else:
        correct1, correct2 = tl.load(dials + 2), tl.load(dials + 3)
        Q_CR = first_CR / (tl.sqrt(second_CR) * (correct1 / correct2) + eps * correct1)
    return tl.sum(Q_CR * Q_CR, axis=1), tl.sum(R_CR * R_CR, axis=1)


@triton.jit
def advance_in_pieces(
    R_CR, m, v, c, begin, C, dials, new1, keep2, new2, eps,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr,
    COMPAT: tl.constexpr,
):  # fmt: skip
    """`advance` for all columns of R, PIECE at a time: R, m and v do not fit the registers."""
    if COLUMNS <= PIECE:
        r = begin + tl.arange(0, COLUMNS)
        place, mask, first_CR, second_CR = moments(m, v, c, r, C, RANK)
        q_C, r_C = advance(
            R_CR, place, mask, first_CR, second_CR, m, v, dials, new1, keep2, new2, eps, COMPAT
        )  # fmt: skip
    else:
        half: tl.constexpr = COLUMNS // 2
        left, right = _halves(R_CR, ROWS, COLUMNS)
        q0, r0 = advance_in_pieces(
            left, m, v, c, begin, C, dials, new1, keep2, new2, eps,
            RANK, ROWS, half, PIECE, COMPAT,
        )  # fmt: skip
        q1, r1 = advance_in_pieces(
            right, m, v, c, begin + half, C, dials, new1, keep2, new2, eps,
            RANK, ROWS, half, PIECE, COMPAT,
        )  # fmt: skip
        q_C, r_C = q0 + q1, r0 + r1
    return q_C, r_C


@triton.jit
def _total(sums, count, BLOCK: tl.constexpr):
    """Return the sum of `count` numbers, always in the same order."""
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, count, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        total += tl.load(sums + place, mask=place < count, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def finish(
    table,
    sums_q,
    sums_r,
    sums_u,
    factors,
    dials,
    count_qr,
    count_u,
    alpha,
    limiter,
    TENSOR: tl.constexpr,
    LIMIT: tl.constexpr,
    COMPAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Apply the limiter to one matrix: what all of its update is multiplied with."""
    matrix = tl.program_id(0).to(tl.int64)
    norm = tl.sqrt(tl.maximum(_total(sums_u + matrix * count_u, count_u, BLOCK), 0.0))
    factor = tl.load(dials) * alpha
    if COMPAT:
        factor = factor * tl.load(dials + 3) / tl.load(dials + 2)
    if TENSOR:
        q = tl.sqrt(_total(sums_q + matrix * count_qr, count_qr, BLOCK))
        r = tl.sqrt(_total(sums_r + matrix * count_qr, count_qr, BLOCK))
        scaling = q / (r + 1e-8)
        norm = norm * scaling
        factor = factor * scaling
    if LIMIT:
        kept = address(table, matrix, 4, tl.float32)
        before = tl.load(kept)
        if not COMPAT:
            before = tl.where(before > 0, before, float("inf"))
        growth = tl.maximum(norm / (before + 1e-8), limiter) / limiter
        tl.store(kept, norm / growth)
        factor = factor / growth
    tl.store(factors + matrix, factor)
