"""Frozen-prefix attention by Triton kernels, with its backward pass.

Shape letters: B rows, H query heads, G key-value heads, R = H / G, T decision positions, P prefix
positions, K width of a head, S splits of the prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, e, log2
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from steer_kernels.attention_backward import key_value_gradient_kernel, query_gradient_kernel
from steer_kernels.attention_forward import combine_kernel, forward_kernel
from steer_kernels.attention_reference import check_attention

__all__ = ["TILES", "Tile", "frozen_prefix_attention"]


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut: query rows, keys of a block, warps, loads in flight, programs per core."""

    rows: int
    keys: int
    warps: int
    stages: int
    resident: int = 1


TILES: dict[str, dict[int, Tile]] = {
    "forward": {
        64: Tile(128, 128, 8, 3),
        128: Tile(128, 64, 8, 3),
        256: Tile(128, 64, 8, 2),
    },
    "query": {
        64: Tile(128, 64, 8, 3),
        128: Tile(128, 64, 8, 3),
        256: Tile(64, 64, 4, 2),
    },
    "key_value": {64: Tile(64, 64, 4, 1), 128: Tile(64, 64, 4, 1), 256: Tile(64, 32, 8, 1)},
}
"""By kernel and width of a head; narrower heads take the tiles of 64. Those of 128 are the fastest of
`benchmarks/frozen_attention.py --sweep` on an H200; those of 64 are taken over from them. Those of 256
were chosen on an H100 by the time of forward and backward together (prefix 8,192, decision 256)."""


def frozen_prefix_attention(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTK: Tensor,
    prefix_k_BGPK: Tensor,
    prefix_v_BGPK: Tensor,
    prefix_lengths_B: Tensor | None = None,
    lengths_B: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Reference: `steer_kernels.attention_reference.frozen_prefix_attention`.

    Keys and values are never joined nor copied; beside the output, float32 `[S, B, H, T, K]` lives
    for the length of a call. The output is laid out as `[B, T, H, K]`.
    """
    check_attention(q_BHTK, k_BGTK, v_BGTK, prefix_k_BGPK, prefix_v_BGPK)
    rows, width, device = len(q_BHTK), q_BHTK.shape[2], q_BHTK.device
    if prefix_lengths_B is None:
        prefix_lengths_B = torch.full((rows,), prefix_k_BGPK.shape[2], device=device)
    if lengths_B is None:
        lengths_B = torch.full((rows,), width, device=device)
    differentiable: Any = _FrozenPrefixAttention.apply
    return differentiable(
        q_BHTK,
        k_BGTK,
        v_BGTK,
        prefix_k_BGPK,
        prefix_v_BGPK,
        prefix_lengths_B.to(torch.int32),
        lengths_B.to(torch.int32),
        q_BHTK.shape[3] ** -0.5 if scale is None else scale,
    )


class _FrozenPrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, prefix_lengths, lengths, scale = inputs
        q, k, v, prefix_k, prefix_v = map(_dense_rows, tensors)
        out, lse = _forward(q, k, v, prefix_k, prefix_v, prefix_lengths, lengths, scale)
        ctx.save_for_backward(q, k, v, prefix_k, prefix_v, prefix_lengths, lengths, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        known: tuple[Any, ...] = (*ctx.saved_tensors, _dense_rows(gradients[0]), ctx.scale)
        return *_backward(*known), None, None, None, None, None


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_lengths: Tensor,
    lengths: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    (rows, heads, width, wide), groups = q.shape, k.shape[1]
    share, prefix, tile = heads // groups, prefix_k.shape[2], _tile("forward", wide)
    tiles = ceil(width * share / tile.rows)
    splits = _splits(tiles * rows * groups, prefix, tile, q.device)
    partial = q.new_empty((splits, rows, heads, width, wide), dtype=torch.float32)
    partial_lse = q.new_empty((splits, rows, heads, width), dtype=torch.float32)
    lse = q.new_empty((rows, heads, width), dtype=torch.float32)
    out = q.new_empty((rows, width, heads, wide)).transpose(1, 2)
    shape = {"K": wide, "R": share}
    launch: Any = forward_kernel
    launch[(tiles, splits, rows * groups)](
        q,
        k,
        v,
        _blocks(prefix_k, tile),
        _blocks(prefix_v, tile),
        prefix_lengths,
        lengths,
        partial,
        partial_lse,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        width,
        prefix,
        groups,
        scale * log2(e),
        **shape,
        M=tile.rows,
        N=tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    _combine(partial, partial_lse, lengths, out, lse, 1.0, share)
    return out, lse


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_lengths: Tensor,
    lengths: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (rows, heads, width, wide), groups = q.shape, k.shape[1]
    share, prefix, tile = heads // groups, prefix_k.shape[2], _tile("query", wide)
    tiles = ceil(width * share / tile.rows)
    splits = _splits(tiles * rows * groups, prefix, tile, q.device)
    partial = q.new_empty((splits, rows, heads, width, wide), dtype=torch.float32)
    delta = torch.empty_like(lse)
    in_base_2 = scale * log2(e)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    shape = {"K": wide, "R": share}
    launch: Any = query_gradient_kernel
    launch[(tiles, splits, rows * groups)](
        q,
        k,
        v,
        _blocks(prefix_k, tile),
        _blocks(prefix_v, tile),
        prefix_lengths,
        lengths,
        out,
        d_out,
        lse,
        delta,
        partial,
        *strides,
        *out.stride()[:3],
        *d_out.stride()[:3],
        width,
        prefix,
        groups,
        in_base_2,
        **shape,
        M=tile.rows,
        N=tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    d_q = torch.empty_like(q)
    _combine(partial, lse, lengths, d_q, lse, scale, share)
    tile = _tile("key_value", wide)
    blocks = ceil(width / tile.keys)
    # A few programs would go through all queries one tile after the other.
    most = max(1, width * share // (2 * tile.rows))
    splits = min(most, max(1, _cores(q.device) // (blocks * rows * groups)))
    dtype = k.dtype if splits == 1 else torch.float32
    d_k, d_v = torch.empty((2, splits, *k.shape), dtype=dtype, device=k.device)
    launch = key_value_gradient_kernel
    launch[(blocks, rows * groups, splits)](
        q,
        k,
        v,
        lengths,
        d_out,
        lse,
        delta,
        d_k,
        d_v,
        *strides,
        *d_out.stride()[:3],
        width,
        groups,
        scale,
        in_base_2,
        **shape,
        M=tile.rows,
        N=tile.keys,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    d_k, d_v = (d_k[0], d_v[0]) if splits == 1 else (d_k.sum(0), d_v.sum(0))
    return d_q, d_k.to(k.dtype), d_v.to(v.dtype)


def _combine(
    partial: Tensor,
    partial_lse: Tensor,
    lengths: Tensor,
    out: Tensor,
    lse: Tensor,
    factor: float,
    share: int,
) -> None:
    """Add the splits' partial sums into `out`; weighted, with `lse`, where that is not an input."""
    splits, rows, heads, width, wide = partial.shape
    few = 16
    launch: Any = combine_kernel
    launch[(ceil(width * share / few), rows * heads // share)](
        partial,
        partial_lse,
        lengths,
        out,
        lse,
        *out.stride()[:3],
        width,
        heads // share,
        factor,
        S=splits,
        WEIGHTED=partial_lse is not lse,
        K=wide,
        R=share,
        M=few,
    )


def _dense_rows(tensor: Tensor) -> Tensor:
    """Copy only what the tensor memory accelerator cannot address: rows that are not 16-byte."""
    step = 16 // tensor.element_size()
    fits = tensor.stride(-1) == 1 and not any(s % step or not s for s in tensor.stride()[:-1])
    return (
        tensor
        if fits and tensor.data_ptr() % 16 == 0
        else tensor.clone(memory_format=torch.contiguous_format)
    )


def _blocks(prefix: Tensor, tile: Tile) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(prefix, [1, 1, tile.keys, prefix.shape[3]])


def _tile(kernel: str, wide: int) -> Tile:
    return TILES[kernel][max(wide, 64)]


def _splits(programs: int, prefix: int, tile: Tile, device: torch.device) -> int:
    """Cut the prefix so that whole waves of programs fill the machine, at the least partial sums."""
    slots = _cores(device) * tile.resident
    most = max(1, min(16, prefix // (4 * tile.keys)))
    # The first term is the time in units of one program that reads the whole prefix; each split
    # adds a partial sum to write and read.
    return min(range(1, most + 1), key=lambda s: ceil(programs * s / slots) / s + 0.004 * s)


def _cores(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
