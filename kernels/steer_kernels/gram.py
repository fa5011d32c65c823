"""Norms of gradients `G = dY^T X` from their factors, all in one launch.

`||G||^2 = <X X^T, dY dY^T>`, of which a program has one tile; both are symmetric, so that tiles
below the diagonal count twice and those above are left out.

Shape letters: D tokens, N and M columns of X and dY, SIDE rows and columns of a tile.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# A kernel is written in Triton's language, in which ranges and pointer types mean something else.
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["factor_squares", "factor_table"]

SIDE, STEP = 64, 64
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def factor_table(inputs: Sequence[Tensor], output_grads: Sequence[Tensor]) -> Tensor:
    """Return what `factor_squares` reads, int64 `[count, 6]` on the CPU: where factors lie.

    Raises:
        ValueError: factors of different tokens or dtypes, or whose rows are not pieces of 16 bytes.
    """
    rows, first = [], inputs[0]
    for pair in zip(inputs, output_grads, strict=True):
        for factor in pair:
            if len(factor) != len(first) or factor.dtype != first.dtype:
                raise ValueError("Factors of one table must have the same tokens and dtype.")
            step = 16 // factor.element_size()
            sizes = (*factor.shape[1:], factor.stride(0))
            if factor.stride(1) != 1 or any(n % step for n in sizes) or factor.data_ptr() % 16:
                raise ValueError("Rows of factors must be dense pieces of 16 bytes.")
        rows.append([number for f in pair for number in (f.data_ptr(), f.shape[1], f.stride(0))])
    return torch.tensor(rows, dtype=torch.int64)


def factor_squares(table: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """Return `||dY^T X||^2` of every row of a table, float32 `[count]`.

    Args:
        table: a `factor_table`, on the factors' device.
        tokens, dtype: D, and the factors' dtype.
    """
    across = -(-tokens // SIDE)
    squares = torch.empty((len(table), across**2), dtype=torch.float32, device=table.device)
    launch: Any = _gram_kernel
    launch[(across**2, len(table))](
        table, squares, tokens, FACTOR=DTYPES[dtype], PIECE=16 // dtype.itemsize, SIDE=SIDE,
        STEP=STEP, num_warps=4, num_stages=4,
    )  # fmt: skip
    return squares.sum(1).clamp_min_(0)


@triton.jit
def _gram(
    numbers,
    near_S,
    far_S,
    D,
    FACTOR: tl.constexpr,
    PIECE: tl.constexpr,
    SIDE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Return a tile `[SIDE, SIDE]` of `F F^T`, F `[D, width]` lying where three numbers say."""
    base = tl.load(numbers).to(tl.pointer_type(FACTOR))
    # Without the promises, every load would be of one element.
    base = tl.multiple_of(base, 16)
    width = tl.multiple_of(tl.load(numbers + 1).to(tl.int32), PIECE)
    stride = tl.multiple_of(tl.load(numbers + 2).to(tl.int32), PIECE)
    near_SN, far_NS = near_S[:, None] * stride, far_S[None, :] * stride
    total_SS = tl.zeros([SIDE, SIDE], tl.float32)
    for begin in range(0, width, STEP):
        n = begin + tl.arange(0, STEP)
        left = tl.load(
            base + near_SN + n[None, :],
            mask=(near_S < D)[:, None] & (n < width)[None, :],
            other=0.0,
        )
        right = tl.load(
            base + far_NS + n[:, None], mask=(far_S < D)[None, :] & (n < width)[:, None], other=0.0
        )
        total_SS = tl.dot(left, right, total_SS, input_precision="tf32x3")
    return total_SS


@triton.jit
def _gram_kernel(
    table,
    squares,
    D,
    FACTOR: tl.constexpr,
    PIECE: tl.constexpr,
    SIDE: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program: one tile of one gradient's two Gram matrices."""
    tile, item = tl.program_id(0), tl.program_id(1).to(tl.int64)
    across = tl.cdiv(D, SIDE)
    lower, upper = tile // across, tile % across
    square = 0.0
    if upper <= lower:
        near_S, far_S = lower * SIDE + tl.arange(0, SIDE), upper * SIDE + tl.arange(0, SIDE)
        x_SS = _gram(table + item * 6, near_S, far_S, D, FACTOR, PIECE, SIDE, STEP)
        dy_SS = _gram(table + item * 6 + 3, near_S, far_S, D, FACTOR, PIECE, SIDE, STEP)
        square = tl.sum(tl.sum(x_SS * dy_SS, 1), 0)
        if upper < lower:
            square = square * 2
    tl.store(squares + item * tl.num_programs(0) + tile, square)
