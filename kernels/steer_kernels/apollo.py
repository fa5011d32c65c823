"""APOLLO and AdamW over many weights in a few launches, with bfloat16 rounded stochastically.

`dense_step`, `factored_step` and `adamw_step` have the names and signatures of their references in
`workbench.train.apollo_steps`, which has the equations and says what the arguments are. All weights
of one shape, stride and dtype share their launches: three where the gradient is in memory, five
where it is factored, one for AdamW. Nothing waits for the device; addresses travel in a table that
is sent again only when one of them changes, so that a captured CUDA graph can be replayed. Where
bfloat16 matrices are regular enough, Hopper GPUs take kernels of their own for the passes that take
longest.

Shape letters: M x N a weight, C = max(M, N) channels, S = min(M, N), R the rank, D tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from steer_kernels import apollo_dense, apollo_factored, apollo_move_strips, apollo_parts
from steer_kernels.apollo_buckets import Row, buckets, numbers_on, table_of

__all__ = ["TILES", "adamw_step", "dense_step", "factored_step"]

# Every launch parameter is decided here and in `_tile`; `benchmarks/apollo.py --tune` tries others.
# `project` is a product with 256 columns whose accumulator fills half the registers of 8 warps;
# `move` and `move_adamw` only have to keep enough loads in flight; `move_factored` has two
# accumulators [64, COLUMNS], and with 128 registers a thread four programs share a multiprocessor,
# so that some multiply while others write.
TILES: dict[str, dict[str, Any]] = {
    "project": {"ROWS": 128, "STEP": 64, "num_warps": 8, "num_stages": 4},
    "move": {"ROWS": 4, "COLUMNS": 1024, "num_warps": 8, "num_stages": 1},
    "move_adamw": {"BLOCK": 2048, "num_warps": 8, "num_stages": 1},
    "shrink": {"ROWS": 64, "STEP": 64, "num_warps": 4, "num_stages": 3},
    "project_factored": {"ROWS": 64, "COLUMNS": 64, "STEP": 64, "num_warps": 4, "num_stages": 2},
    "norm_factored": {"SIDE": 64, "STEP": 64, "num_warps": 4, "num_stages": 4},
    "move_factored": {"COLUMNS": 64, "STEP": 64, "num_warps": 4, "num_stages": 2, "maxnreg": 128},
}
# The same for Hopper's own kernels; those of `move_strips` by the tokens that fit beside all stages.
HOPPER_PROJECT = {"STAGES": 4}
STRIPS = {
    64: {"COLUMNS": 128, "SPAN": 8, "STAGES": 4, "num_warps": 8},
    128: {"COLUMNS": 128, "SPAN": 16, "STAGES": 3, "num_warps": 8},
    256: {"COLUMNS": 64, "SPAN": 16, "STAGES": 3, "num_warps": 8},
}
HOPPER_RANKS = (128, 256)
HOPPER_TOKENS = 100  # with fewer, `project_factored` is the faster one
GLUON = "3.6."  # the versions of Triton whose Gluon `project` is written in
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
BITS = {torch.float32: tl.int32, torch.bfloat16: tl.int16}
# A kernel is subscripted with its grid, which type checkers do not know of a decorated function.
DENSE: Any = apollo_dense
FACTORED: Any = apollo_factored
EVEN: Any = apollo_move_strips
PARTS: Any = apollo_parts
WHOLE_ROW = 256


def dense_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    norms: Sequence[Tensor],
    keys: Sequence[int],
    signs_SR: Tensor,
    dials: Tensor,
    **rule: Any,
) -> None:
    """Move matrices by their gradients: `workbench.train.apollo_steps.dense_step`."""
    rows = zip(weights, gradients, firsts, seconds, norms, keys, strict=True)
    for bucket in buckets(Row(w, g, m, v, n, k) for w, g, m, v, n, k in rows):
        _dense(bucket, signs_SR, dials, rule)


def factored_step(
    weights: Sequence[Tensor],
    inputs: Sequence[Tensor],
    output_grads: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    norms: Sequence[Tensor],
    keys: Sequence[int],
    signs_SR: Tensor,
    dials: Tensor,
    **rule: Any,
) -> None:
    """Move matrices by factors of their gradients: `workbench.train.apollo_steps.factored_step`."""
    rows = zip(weights, inputs, output_grads, firsts, seconds, norms, keys, strict=True)
    for bucket in buckets(Row(w, x, m, v, n, k, y) for w, x, y, m, v, n, k in rows):
        _factored(bucket, signs_SR, dials, rule)


def adamw_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    keys: Sequence[int],
    dials: Tensor,
    **rule: Any,
) -> None:
    """Take AdamW's step on any weights: `workbench.train.apollo_steps.adamw_step`."""
    rows = zip(weights, gradients, firsts, seconds, keys, strict=True)
    flat = (Row(_flat(w), _flat(g), _flat(m), _flat(v), None, k) for w, g, m, v, k in rows)
    kinds: dict[tuple[Any, ...], list[Row]] = {}
    for row, weight in zip(flat, weights, strict=True):
        if row.weight.data_ptr() != weight.data_ptr():
            row.back.append((weight, row.weight))
        # A norm's few elements beside an embedding's millions would start millions of programs.
        size = 1 << row.weight.numel().bit_length()
        kinds.setdefault((row.weight.dtype, row.second.dtype, size), []).append(row)
    for bucket in kinds.values():
        _adamw([row.aligned() for row in bucket], dials, rule)
        for row in bucket:
            row.give_back()


@dataclass
class _Scratch:
    """What the launches of one bucket hand to each other."""

    scalings: Tensor
    q: Tensor
    r: Tensor
    u: Tensor
    factors: Tensor


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)


def _dense(bucket: list[Row], signs_SR: Tensor, dials: Tensor, rule: dict[str, Any]) -> None:
    weight, grad, device = bucket[0].weight, bucket[0].second, bucket[0].weight.device
    (M, N), tall, rank = weight.shape, weight.shape[0] >= weight.shape[1], signs_SR.shape[1]
    C, S = (M, N) if tall else (N, M)
    across, along = grad.stride() if tall else reversed(grad.stride())
    tensor, compat = rule["scaling"] == "tensor", rule["compat"]
    columns, tile = _tile("project", rank, grad.dtype)
    table, flags = table_of(bucket), {"TENSOR": tensor, "COMPAT": compat}
    near, far = (S, across) if along == 1 else (C, along)
    hopper = _hopper(device) if rank in HOPPER_RANKS and 1 in (across, along) else None
    if hopper and grad.dtype == signs_SR.dtype == torch.bfloat16 and near % 16 == far % 16 == 0:
        blocks = 2 * _pieces(C, 128)
        scratch = _scratch(len(bucket), C, blocks, blocks, device)
        hopper.project(
            table, signs_SR, 0, scratch, dials, C, S, far, rank, rule, len(bucket),
            FIELD=1, ROWWISE=along == 1, SQUARE=True,
        )  # fmt: skip
    else:
        blocks = _pieces(C, tile["ROWS"])
        scratch = _scratch(len(bucket), C, blocks, blocks, device)
        DENSE.project[(blocks, len(bucket))](
            table, signs_SR, scratch.scalings, scratch.q, scratch.r, scratch.u, dials,
            C, S, across, along, rank**-0.5, *_decays(rule),
            RANK=rank, GRAD=DTYPES[grad.dtype], BITS=BITS[grad.dtype], **flags, COLUMNS=columns, **tile,
        )  # fmt: skip
    _finish(table, scratch, dials, blocks, blocks, S, rank, rule)
    tile = dict(TILES["move"])
    tile["COLUMNS"] = min(tile["COLUMNS"], max(16, _power_of_two(N)))
    tiles = _pieces(M, 128) * (64 // tile["ROWS"]) * _pieces(N, tile["COLUMNS"])
    DENSE.move[(tiles, len(bucket))](
        table, scratch.scalings, scratch.factors, dials, M, N, *weight.stride(), *grad.stride(),
        WEIGHT=DTYPES[weight.dtype], GRAD=DTYPES[grad.dtype], TALL=tall, **flags, **tile,
    )  # fmt: skip


def _factored(bucket: list[Row], signs_SR: Tensor, dials: Tensor, rule: dict[str, Any]) -> None:
    weight, x_DN, dy_DM = bucket[0].weight, bucket[0].second, bucket[0].other
    assert dy_DM is not None
    (M, N), tall, rank = weight.shape, weight.shape[0] >= weight.shape[1], signs_SR.shape[1]
    C, S = (M, N) if tall else (N, M)
    D, count, device = len(x_DN), len(bucket), weight.device
    # A is the factor on the channels' side, B the other; the table has X at 1 and dY at 6.
    (a, a_field), (b, b_field) = ((dy_DM, 6), (x_DN, 1)) if tall else ((x_DN, 1), (dy_DM, 6))
    tensor, compat = rule["scaling"] == "tensor", rule["compat"]
    factor = DTYPES[x_DN.dtype]
    columns, tile = _tile("project_factored", rank, x_DN.dtype)
    small = _tile("shrink", rank, x_DN.dtype)[1]
    norm = _tile("norm_factored", rank, x_DN.dtype)[1]
    regular = x_DN.dtype == torch.bfloat16 and M % 16 == N % 16 == 0
    regular = regular and x_DN.stride(0) % 16 == dy_DM.stride(0) % 16 == 0
    many = rank in HOPPER_RANKS and D >= HOPPER_TOKENS
    hopper = _hopper(device) if regular and many else None
    blocks = 2 * _pieces(C, 128) if hopper else _pieces(C, tile["ROWS"])
    tiles = _pieces(D, norm["SIDE"]) ** 2
    table, scratch = table_of(bucket), _scratch(count, C, blocks, tiles, device)
    Z = torch.empty(count, D, columns, dtype=x_DN.dtype, device=device)
    if D:
        FACTORED.shrink[(_pieces(D, small["ROWS"]), count)](
            table, signs_SR, Z, D, S, b.stride(0),
            B_FIELD=b_field, RANK=rank, FACTOR=factor, COLUMNS=columns, **small,
        )  # fmt: skip
    if hopper:
        hopper.project(
            table, Z, D, scratch, dials, C, D, a.stride(0), rank, rule, count,
            FIELD=a_field, ROWWISE=False, SQUARE=False,
        )  # fmt: skip
    else:
        FACTORED.project_factored[(blocks, count)](
            table, Z, scratch.scalings, scratch.q, scratch.r, dials, C, D, a.stride(0), rank**-0.5,
            *_decays(rule), A_FIELD=a_field, RANK=rank, FACTOR=factor, COMPAT=compat,
            WIDTH=columns, **(tile | {"COLUMNS": min(tile["COLUMNS"], columns)}),
        )  # fmt: skip
    if D:
        FACTORED.norm_factored[(tiles, count)](
            table, scratch.scalings, scratch.u, C, S, D, a.stride(0), b.stride(0),
            A_FIELD=a_field, B_FIELD=b_field, FACTOR=factor, TENSOR=tensor, **norm,
        )  # fmt: skip
    _finish(table, scratch, dials, blocks, tiles, S, rank, rule)
    _move_factored(bucket, table, scratch, dials, rule)


def _move_factored(
    bucket: list[Row], table: Tensor, scratch: _Scratch, dials: Tensor, rule: dict[str, Any]
) -> None:
    weight, x_DN, dy_DM = bucket[0].weight, bucket[0].second, bucket[0].other
    assert dy_DM is not None
    (M, N), D, count = weight.shape, len(x_DN), len(bucket)
    given = (table, scratch.scalings, scratch.factors, dials, M, N, D)
    flags = {"TALL": M >= N, "TENSOR": rule["scaling"] == "tensor", "COMPAT": rule["compat"]}
    if _even(weight, x_DN, dy_DM) and _roomy(weight.device):
        tile = _strip(D)
        chunks, depth = _pieces(N, tile["COLUMNS"] * tile["SPAN"]), max(16, _power_of_two(D))
        EVEN.move_strips[(M // 128 * chunks, count)](
            *given, weight.stride(0), x_DN.stride(0), dy_DM.stride(0), chunks,
            DEPTH=depth, FULL=depth == D, **flags, **tile,
        )  # fmt: skip
        return
    tile = _tile("move_factored", 1, x_DN.dtype)[1]
    FACTORED.move_factored[(_pieces(M, 128) * _pieces(N, tile["COLUMNS"]), count)](
        *given, *weight.stride(), x_DN.stride(0), dy_DM.stride(0),
        WEIGHT=DTYPES[weight.dtype], FACTOR=DTYPES[x_DN.dtype], **flags, **tile,
    )  # fmt: skip


def _even(weight: Tensor, x_DN: Tensor, dy_DM: Tensor) -> bool:
    """Whether nothing but tokens needs a mask, and every row can be read 16 bytes at a time."""
    (M, N), D = weight.shape, len(x_DN)
    if not (weight.dtype == x_DN.dtype == torch.bfloat16 and 0 < D <= max(STRIPS)):
        return False
    strides = (weight.stride(0), x_DN.stride(0), dy_DM.stride(0))
    whole = M % 128 == N % _strip(D)["COLUMNS"] == 0 and weight.stride(1) == 1
    return whole and all(stride % 16 == 0 for stride in strides)


def _strip(D: int) -> dict[str, Any]:
    return STRIPS[min(size for size in STRIPS if size >= D)]


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def _roomy(device: torch.device) -> bool:
    """Whether the stages of `move_strips` fit: on Hopper, and in the interpreter."""
    return device.type == "cpu" or _is_hopper(device)


class _Hopper:
    """Launches Hopper's own `project`: a program for each multiprocessor, which takes many tiles."""

    def __init__(self, device: torch.device) -> None:
        from steer_kernels import apollo_project_hopper  # noqa: PLC0415

        self.kernel: Any = apollo_project_hopper.project
        self.programs = torch.cuda.get_device_properties(device).multi_processor_count

    def project(
        self, table: Tensor, P: Tensor, P_rows: int, scratch: _Scratch, dials: Tensor,
        C: int, S: int, stride: int, rank: int, rule: dict[str, Any], count: int, **flags: Any,
    ) -> None:  # fmt: skip
        blocks = _pieces(C, 128)
        self.kernel[(min(self.programs, blocks * count),)](
            table, P, P_rows, scratch.scalings, scratch.q, scratch.r, scratch.u, dials,
            C, S, stride, rank**-0.5, *_decays(rule), blocks * count, blocks,
            RANK=rank, TENSOR=rule["scaling"] == "tensor", COMPAT=rule["compat"],
            **flags, **HOPPER_PROJECT, num_warps=4,
        )  # fmt: skip


@functools.cache
def _hopper(device: torch.device) -> _Hopper | None:
    fits = _is_hopper(device) and triton.__version__.startswith(GLUON)
    return _Hopper(device) if fits else None


def _adamw(bucket: list[Row], dials: Tensor, rule: dict[str, Any]) -> None:
    weight, grad = bucket[0].weight, bucket[0].second
    tile, sizes = TILES["move_adamw"], [row.weight.numel() for row in bucket]
    DENSE.move_adamw[(max(1, _pieces(max(sizes), tile["BLOCK"])), len(bucket))](
        table_of(bucket), numbers_on(tuple(sizes), weight.device), dials, *_decays(rule),
        WEIGHT=DTYPES[weight.dtype], GRAD=DTYPES[grad.dtype], COMPAT=rule["compat"], **tile,
    )  # fmt: skip


def _finish(
    table: Tensor,
    scratch: _Scratch,
    dials: Tensor,
    count_qr: int,
    count_u: int,
    small: int,
    rank: int,
    rule: dict[str, Any],
) -> None:
    alpha = math.sqrt(small / rank) if rule["scale"] == "auto" else rule["scale"]
    PARTS.finish[(len(scratch.factors),)](
        table, scratch.q, scratch.r, scratch.u, scratch.factors, dials, count_qr, count_u,
        float(alpha), float(rule["limiter"] or 1.0), TENSOR=rule["scaling"] == "tensor",
        LIMIT=rule["limiter"] is not None, COMPAT=rule["compat"], BLOCK=256, num_warps=4,
    )  # fmt: skip


def _decays(rule: dict[str, Any]) -> tuple[float, float, float, float]:
    beta1, beta2 = rule["betas"]
    return 1.0 - beta1, float(beta2), 1.0 - beta2, float(rule["eps"])


def _pieces(size: int, piece: int) -> int:
    return -(-size // piece)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _tile(kernel: str, rank: int, dtype: torch.dtype) -> tuple[int, dict[str, Any]]:
    """Return the columns that hold R, and a tile whose accumulator and buffers fit the chip."""
    columns, tile = max(16, _power_of_two(rank)), dict(TILES[kernel])
    if columns > WHOLE_ROW and "ROWS" in tile:
        tile["ROWS"] = tile["ROWS"] * WHOLE_ROW // columns
    if dtype == torch.float32:
        tile["STEP"] //= 2
    return columns, tile


def _scratch(count: int, C: int, blocks: int, tiles: int, device: torch.device) -> _Scratch:
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=device)  # noqa: E731
    sums = new(2, count, blocks)
    return _Scratch(new(count, C), sums[0], sums[1], new(count, tiles), new(count))
