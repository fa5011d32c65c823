"""The gated delta rule by Triton kernels, one launch forward and one backward.

Shape letters: as in `gdn_forward`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from steer_kernels.gdn_backward import backward_kernel
from steer_kernels.gdn_forward import forward_kernel
from steer_kernels.gdn_reference import check_delta

__all__ = ["TILES", "Tile", "gated_delta_rule"]


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut: columns of the state in a program, and warps."""

    columns: int
    warps: int


CHUNK = 16
"""Positions that are solved as one triangular system, 16, 32 or 64."""
TILES: dict[str, Tile] = {"forward": Tile(32, 4), "backward": Tile(16, 4)}
"""Chunk and tiles are the fastest of `benchmarks/gdn.py --sweep` on an H200."""


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

    Kept for the backward pass, in float32: the state before each chunk, the chunks' inverses
    `[C, C]` and updates `[T, E]` of each head.
    """
    check_delta(q_BTJK, k_BTJK, v_BTHE, g_BTH, beta_BTH, state_BHKE)
    if lengths_B is None:
        lengths_B = torch.full((len(v_BTHE),), v_BTHE.shape[1], device=v_BTHE.device)
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
        chunks, tile = ceil(width / CHUNK), TILES["forward"]
        columns = min(tile.columns, out_width)
        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        wide = {"dtype": torch.float32, "device": v.device}
        updates = torch.empty((rows, heads, width, out_width), **wide)
        inverses = torch.empty((rows, heads, chunks, CHUNK, CHUNK), **wide)
        states = torch.empty((rows, heads, chunks, key_width, out_width), **wide)
        launch: Any = forward_kernel
        launch[(out_width // columns, rows * heads)](
            q,
            k,
            v,
            g,
            beta,
            state.contiguous(),
            lengths,
            out,
            updates,
            inverses,
            states,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *g.stride(),
            *beta.stride(),
            width,
            heads,
            scale,
            SHARE=heads // q.shape[2],
            K=key_width,
            E=out_width,
            C=CHUNK,
            F=columns,
            NORMALISE=normalise,
            LEVELS=CHUNK.bit_length() - 1,
            num_warps=tile.warps,
            num_stages=1,
        )
        ctx.save_for_backward(q, k, v, g, beta, lengths, updates, inverses, states)
        ctx.scale, ctx.normalise = scale, normalise
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, k, v, g, beta, lengths, updates, inverses, states = ctx.saved_tensors
        (rows, width, heads, out_width), (keys, key_width) = v.shape, q.shape[2:]
        tile, chunk = TILES["backward"], inverses.shape[-1]
        columns = min(tile.columns, out_width)
        parts = out_width // columns
        wide = {"dtype": torch.float32, "device": v.device}
        d_qk = torch.empty((2, parts, rows, width, keys, heads // keys, key_width), **wide)
        d_gates = torch.empty((2, parts, rows, width, heads), **wide)
        d_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        launch: Any = backward_kernel
        launch[(parts, rows * heads)](
            q,
            k,
            v,
            g,
            beta,
            lengths,
            updates,
            inverses,
            states,
            gradients[0],
            d_qk,
            d_v,
            d_gates,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *g.stride(),
            *beta.stride(),
            *gradients[0].stride(),
            width,
            heads,
            ctx.scale,
            SHARE=heads // keys,
            K=key_width,
            E=out_width,
            C=chunk,
            F=columns,
            NORMALISE=ctx.normalise,
            num_warps=tile.warps,
            num_stages=1,
        )
        d_q, d_k = d_qk.sum(dim=(1, 5)).to(q.dtype)
        d_g, d_beta = d_gates.sum(dim=1)
        return d_q, d_k, d_v, d_g.to(g.dtype), d_beta.to(beta.dtype), None, None, None, None
