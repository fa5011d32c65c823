"""The divergence of a student's logits from a teacher's likeliest tokens, in place.

    L = sum_n w_n KL(t_n || s_n)        d L / d logit_j = w (s_j - t_j)                 j kept
                                                        = w (s_j - t_rest s_j / s_rest)  otherwise

The tokens that the teacher does not keep are one bucket, `rest`. A row of logits is read once forward,
and once backward, when its gradient is written over it: beside the logits, nothing of their size is
ever made.

Shape letters: N positions, V vocabulary, K tokens that the teacher's distribution keeps, B logits of
a block.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# A kernel is written in Triton's language, in which ranges and pointer types mean something else.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["spending_soft_loss"]

CUT: dict[str, int] = {"BLOCK": 4096, "num_warps": 8}


def spending_soft_loss(
    logits_NV: Tensor, ids_NK: Tensor, log_probs_NK: Tensor, log_rest_N: Tensor, weights_N: Tensor
) -> Tensor:
    """Reference: `workbench.train.losses.soft_loss`; sums are in float32.

    The backward pass writes the gradient over the logits, so that nobody else may need them then,
    and there can be only one.

    Args:
        logits_NV: contiguous.
        ids_NK: int32 or int64, all of a row different.
        log_probs_NK, log_rest_N: the teacher's, any floating dtypes; normalised again.
        weights_N: float32; padding has 0.

    Returns:
        A float32 scalar.
    """
    differentiable: Any = _SpendingSoftLoss.apply
    return differentiable(logits_NV, ids_NK, log_probs_NK, log_rest_N, weights_N)


class _SpendingSoftLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        logits, *rest = (tensor.contiguous() for tensor in inputs)
        sums_2N = torch.empty((2, len(logits)), dtype=torch.float32, device=logits.device)
        each_N = torch.empty_like(sums_2N[0])
        _launch(_forward_kernel, logits, rest, sums_2N, each_N)
        ctx.save_for_backward(logits, *rest, sums_2N)
        return each_N.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        logits, *rest, sums_2N = ctx.saved_tensors
        _launch(_backward_kernel, logits, rest, sums_2N, gradients[0])
        return logits, None, None, None, None


def _launch(kernel: Any, logits: Tensor, rest: list[Tensor], *others: Tensor) -> None:
    (positions, vocabulary), kept = logits.shape, rest[0].shape[1]
    kernel[(positions,)](
        logits, *rest, *others, positions, vocabulary, kept, KEPT=1 << max(kept - 1, 0).bit_length(), **CUT
    )  # fmt: skip


@triton.jit
def _teacher(log_probs, log_rest, n, K, i_K):
    """Return the logarithms `[K]` of what a teacher keeps, normalised, and that of the rest."""
    log_K = tl.load(log_probs + n * K + i_K, mask=i_K < K, other=float("-inf")).to(tl.float32)
    rest = tl.load(log_rest + n).to(tl.float32)
    top = tl.maximum(tl.max(log_K, 0), rest)
    total = top + tl.log(tl.sum(tl.exp(log_K - top), 0) + tl.exp(rest - top))
    return log_K - total, rest - total


@triton.jit
def _forward_kernel(
    logits,
    ids,
    log_probs,
    log_rest,
    weights,
    sums,
    each,
    N,
    V,
    K,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one position's weighted divergence, and its logits' two log-sum-exps."""
    n = tl.program_id(0).to(tl.int64)
    i_K, i_B = tl.arange(0, KEPT), tl.arange(0, BLOCK)
    row, inside_K = logits + n * V, i_K < K
    id_K = tl.load(ids + n * K + i_K, mask=inside_K, other=0)
    kept_K = tl.load(row + id_K, mask=inside_K, other=float("-inf"))
    # Out of the way for as long as the rest is summed, which a difference of sums would not be.
    tl.debug_barrier()
    never_K = tl.full([KEPT], float("-inf"), tl.float32).to(logits.dtype.element_ty)
    tl.store(row + id_K, never_K, mask=inside_K)
    tl.debug_barrier()
    top_B = tl.full([BLOCK], float("-inf"), tl.float32)
    sum_B = tl.zeros([BLOCK], tl.float32)
    for first in range(0, V, BLOCK):
        x_B = tl.load(row + first + i_B, mask=first + i_B < V, other=float("-inf")).to(tl.float32)
        new_B = tl.maximum(top_B, x_B)
        base_B = tl.where(new_B == float("-inf"), 0.0, new_B)
        sum_B = sum_B * tl.exp(top_B - base_B) + tl.exp(x_B - base_B)
        top_B = new_B
    tl.debug_barrier()
    tl.store(row + id_K, kept_K, mask=inside_K)
    top = tl.max(top_B, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    rest = base + tl.log(tl.sum(sum_B * tl.exp(top_B - base), 0))
    kept_K = kept_K.to(tl.float32)
    most = tl.maximum(tl.max(kept_K, 0), rest)
    whole = most + tl.log(tl.sum(tl.exp(kept_K - most), 0) + tl.exp(rest - most))

    log_K, log_others = _teacher(log_probs, log_rest, n, K, i_K)
    part_K = tl.exp(log_K) * (log_K - (kept_K - whole))
    loss = tl.sum(tl.where(inside_K & (log_K > float("-inf")), part_K, 0.0), 0)
    others = tl.exp(log_others) * (log_others - (rest - whole))
    loss += tl.where(log_others == float("-inf"), 0.0, others)
    # A padded position says nothing, whatever its logits are.
    weight = tl.load(weights + n)
    tl.store(each + n, tl.where(weight == 0.0, 0.0, loss * weight))
    tl.store(sums + n, whole)
    tl.store(sums + N + n, rest)


@triton.jit
def _backward_kernel(
    logits,
    ids,
    log_probs,
    log_rest,
    weights,
    sums,
    d_loss,
    N,
    V,
    K,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the gradient of one position's logits, written over them."""
    n = tl.program_id(0).to(tl.int64)
    i_K, i_B = tl.arange(0, KEPT), tl.arange(0, BLOCK)
    row, inside_K = logits + n * V, i_K < K
    kind: tl.constexpr = logits.dtype.element_ty
    weight = tl.load(weights + n)
    if weight == 0.0:
        for first in range(0, V, BLOCK):
            nothing_B = tl.zeros([BLOCK], tl.float32).to(kind)
            tl.store(row + first + i_B, nothing_B, mask=first + i_B < V)
    else:
        factor = weight * tl.load(d_loss).to(tl.float32)
        id_K = tl.load(ids + n * K + i_K, mask=inside_K, other=0)
        kept_K = tl.load(row + id_K, mask=inside_K, other=float("-inf")).to(tl.float32)
        whole, rest = tl.load(sums + n), tl.load(sums + N + n)
        log_K, log_others = _teacher(log_probs, log_rest, n, K, i_K)
        # Of `t_rest s_j / s_rest` and `s_j`, both have `exp(logit_j)`.
        share = tl.where(log_others == float("-inf"), 0.0, tl.exp(log_others - rest + whole))
        for first in range(0, V, BLOCK):
            inside_B = first + i_B < V
            x_B = tl.load(row + first + i_B, mask=inside_B, other=0.0).to(tl.float32)
            d_B = factor * tl.exp(x_B - whole) * (1.0 - share)
            tl.store(row + first + i_B, d_B.to(kind), mask=inside_B)
        tl.debug_barrier()
        d_K = factor * (tl.exp(kept_K - whole) - tl.exp(log_K))
        tl.store(row + id_K, d_K.to(kind), mask=inside_K)
