"""The gated delta rule by Triton kernels, two launches forward and two backward.

Shape letters: as in `gdn_forward`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from steer_kernels.gdn_backward import chain_backward_kernel, gradient_kernel
from steer_kernels.gdn_forward import chain_kernel, prepare_kernel
from steer_kernels.gdn_reference import check_delta

__all__ = ["TILES", "Tile", "gated_delta_rule"]


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut: columns that are worked on at a time, warps, and loads in flight."""

    columns: int
    warps: int
    stages: int = 1


CHUNK = 32
"""Positions that are solved as one triangular system, 16, 32 or 64."""
TILES: dict[str, Tile] = {
    "prepare": Tile(128, 8),
    "forward": Tile(16, 4, 3),
    "backward": Tile(16, 4, 3),
    "gradients": Tile(64, 8),
}
"""Chunk and tiles are the fastest of `benchmarks/gdn.py --sweep` on an H100."""


def gated_delta_rule(
    q_BTJK: Tensor,
    k_BTJK: Tensor,
    v_BTHE: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    state_BHKE: Tensor,
    lengths_B: Tensor | None = None,
    scale: float | None = None,
    normalise: bool = False,
) -> Tensor:
    """Reference: `steer_kernels.gdn_reference.gated_delta_rule`.

    Products are of tf32, and of bfloat16 where the values are. Kept for the backward pass: the
    state before each chunk, three matrices `[T, K]`, two `[T, C]` and one `[T, E]` of each head.
    """
    check_delta(q_BTJK, k_BTJK, v_BTHE, g_BTH, beta_BTH, state_BHKE)
    if lengths_B is None:
        lengths_B = torch.full(
            (len(v_BTHE),), v_BTHE.shape[1], dtype=torch.int32, device=v_BTHE.device
        )
    differentiable: Any = _GatedDeltaRule.apply
    return differentiable(
        q_BTJK,
        k_BTJK,
        v_BTHE,
        g_BTH,
        beta_BTH,
        state_BHKE,
        lengths_B.to(torch.int32),
        q_BTJK.shape[3] ** -0.5 if scale is None else scale,
        normalise,
    )


class _GatedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        q, k, v, g, beta, state, lengths, scale, normalise = inputs
        (rows, width, heads, out_width), key_width = v.shape, q.shape[3]
        chunks = ceil(width / CHUNK)
        kind = _products(v.dtype)

        def new(*shape: int, dtype: torch.dtype = kind) -> Tensor:
            return torch.empty((rows, heads, *shape), dtype=dtype, device=v.device)

        queries, keys, weights = (new(chunks, CHUNK, key_width) for _ in range(3))
        reads, inverses = (new(chunks, CHUNK, CHUNK) for _ in range(2))
        updates = new(chunks, CHUNK, out_width, dtype=torch.float32)
        states, fades = new(chunks, key_width, out_width), new(chunks, dtype=torch.float32)
        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        sizes = {"K": key_width, "E": out_width, "C": CHUNK}
        launch: Any = prepare_kernel
        launch[(chunks, rows * heads)](
            q, k, v, g, beta, lengths,
            queries, keys, weights, reads, inverses, updates, fades,
            *q.stride(), *k.stride(), *v.stride(), *g.stride(), *beta.stride(),
            heads, scale, SHARE=heads // q.shape[2], **sizes,
            NORMALISE=normalise, LEVELS=CHUNK.bit_length() - 1, **_cut("prepare"),
        )  # fmt: skip
        columns = min(TILES["forward"].columns, out_width)
        launch = chain_kernel
        launch[(out_width // columns, rows * heads)](
            state.contiguous(), queries, keys, weights, reads, updates, fades, states, out,
            width, heads, chunks, **sizes, F=columns, **_cut("forward"),
        )  # fmt: skip
        ctx.save_for_backward(
            q, k, v, g, beta, lengths,
            queries, keys, weights, reads, inverses, updates, fades, states,
        )  # fmt: skip
        ctx.scale, ctx.normalise = scale, normalise
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, k, v, g, beta, lengths, *kept = ctx.saved_tensors
        queries, keys, weights, reads, inverses, updates, fades, states = kept
        (rows, width, heads, out_width), share = v.shape, v.shape[2] // q.shape[2]
        chunks, chunk = reads.shape[2:4]
        sizes = {"K": q.shape[3], "E": out_width, "C": chunk}
        d_updates = torch.empty_like(updates, dtype=weights.dtype)
        d_states = torch.empty_like(states)
        columns = min(TILES["backward"].columns, out_width)
        launch: Any = chain_backward_kernel
        launch[(out_width // columns, rows * heads)](
            gradients[0], lengths, queries, keys, weights, reads, fades, d_updates, d_states,
            *gradients[0].stride(), heads, chunks, **sizes, F=columns, **_cut("backward"),
        )  # fmt: skip
        # Value heads that share queries and keys leave their shares of the gradients to be added.
        shared = (rows, width, heads, q.shape[3])
        dtypes = (x.dtype if share == 1 else torch.float32 for x in (q, k))
        d_q, d_k = (torch.empty(shared, dtype=dtype, device=v.device) for dtype in dtypes)
        d_v, d_g, d_beta = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (v, g, beta)
        )
        launch = gradient_kernel
        launch[(chunks, rows * heads)](
            q, k, v, g, beta, gradients[0], lengths,
            reads, inverses, updates, states, d_updates, d_states, d_q, d_k, d_v, d_g, d_beta,
            *q.stride(), *k.stride(), *v.stride(), *g.stride(), *beta.stride(),
            *gradients[0].stride(), width, heads, ctx.scale, SHARE=share, **sizes,
            F=min(TILES["gradients"].columns, out_width), NORMALISE=ctx.normalise,
            **_cut("gradients"),
        )  # fmt: skip
        if share > 1:
            d_q, d_k = (
                x.unflatten(2, (-1, share)).sum(3).to(own.dtype) for x, own in ((d_q, q), (d_k, k))
            )
        return d_q, d_k, d_v, d_g, d_beta, None, None, None, None


def _products(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what is multiplied; Triton's interpreter multiplies bfloat16 by its bits."""
    half = dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") != "1"
    return torch.bfloat16 if half else torch.float32


def _cut(kernel: str) -> dict[str, int]:
    return {"num_warps": TILES[kernel].warps, "num_stages": TILES[kernel].stages}
