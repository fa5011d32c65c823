"""`apollo_factored.move_factored` for bfloat16 on Hopper, in Gluon: one read of Y for many columns.

A program stays on its multiprocessor and takes one strip of W after the other, 128 rows by SPAN
tiles of 64 columns. Four warps copy Y of the strip's rows to shared memory once, and X and W of each
tile into a ring; groups of four warps take the tiles in turn, so that one multiplies while another
rounds and writes.

Shape letters: M x N a weight, D tokens.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false
# A kernel is written in Gluon's language, in which ranges and tuples mean something else.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from steer_kernels.apollo_parts import address, random_words, rounded, turn_of

__all__ = ["move_factored"]


@gluon.jit
def _strip(item, groups, chunks):
    """Return matrix, group of rows and chunk of columns of one strip."""
    rest = item // chunks
    return (rest // groups).to(gl.int64), rest % groups, item % chunks


@gluon.jit
def _copy(given, ring, DEPTH: gl.constexpr, SPAN: gl.constexpr, STAGES: gl.constexpr):
    table, M, N, D, w_row, stride_x, stride_y, items, groups, chunks = given
    X_ring, high_ring, low_ring, Y_high, Y_low, full, empty, strip_full, strip_empty = ring
    tile: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    far = gl.arange(0, 64, layout=gl.SliceLayout(1, tile))
    near = gl.arange(0, 64, layout=gl.SliceLayout(0, tile))
    j = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        matrix, group, chunk = _strip(item, groups, chunks)
        W = address(table, matrix, 0, gl.bfloat16)
        X, Y = address(table, matrix, 1, gl.bfloat16), address(table, matrix, 6, gl.bfloat16)
        row = group * 128
        turn = item // gl.num_programs(0)
        mbarrier.wait(strip_empty, (turn & 1) ^ 1)
        for d in gl.static_range(0, DEPTH, 64):
            place = Y + ((d + far)[:, None] * stride_y + (row + near)[None, :])
            mask = (d + far < D)[:, None] & (row + near < M)[None, :]
            async_copy.async_copy_global_to_shared(Y_high.slice(d, 64), place, mask)
            mask = (d + far < D)[:, None] & (row + 64 + near < M)[None, :]
            async_copy.async_copy_global_to_shared(Y_low.slice(d, 64), place + 64, mask)
        async_copy.mbarrier_arrive(strip_full, increment_count=False)
        for begin in range(chunk * SPAN * 64, gl.minimum((chunk + 1) * SPAN * 64, N), 64):
            s = j % STAGES
            mbarrier.wait(empty.index(s), ((j // STAGES) & 1) ^ 1)
            column = begin + near
            place = W + ((row + far)[:, None] * w_row + column[None, :])
            mask = (row + far < M)[:, None] & (column < N)[None, :]
            async_copy.async_copy_global_to_shared(high_ring.index(s), place, mask)
            mask = (row + 64 + far < M)[:, None] & (column < N)[None, :]
            async_copy.async_copy_global_to_shared(low_ring.index(s), place + 64 * w_row, mask)
            for d in gl.static_range(0, DEPTH, 64):
                place = X + ((d + far)[:, None] * stride_x + column[None, :])
                mask = (d + far < D)[:, None] & (column < N)[None, :]
                async_copy.async_copy_global_to_shared(X_ring.index(s).slice(d, 64), place, mask)
            async_copy.mbarrier_arrive(full.index(s), increment_count=False)
            j += 1
    async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit
def _written(W_MN, update_MN, scaling, place, mask, decay, noise, COMPAT: gl.constexpr):
    near: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    update_MN *= scaling
    if COMPAT:
        W_MN = (W_MN.to(gl.float32) - update_MN) * decay
    else:
        W_MN = W_MN.to(gl.float32) * decay - update_MN
    gl.store(place, gl.convert_layout(rounded(W_MN, noise, gl.bfloat16), near), mask=mask)


@gluon.jit
def _multiply(
    worker: gl.constexpr, given, ring,
    TALL: gl.constexpr, TENSOR: gl.constexpr, COMPAT: gl.constexpr,
    SPAN: gl.constexpr, STAGES: gl.constexpr, WORKERS: gl.constexpr,
):  # fmt: skip
    table, scalings, factors, dials, M, N, w_row, items, groups, chunks = given
    X_ring, high_ring, low_ring, Y_high, Y_low, full, empty, strip_full, strip_empty = ring
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    near: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    inside = gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    across = gl.arange(0, 64, layout=gl.SliceLayout(0, mma))
    down = gl.arange(0, 64, layout=gl.SliceLayout(1, near))
    along = gl.arange(0, 64, layout=gl.SliceLayout(0, near))
    noise, decay = turn_of(dials), gl.load(dials + 1)
    before = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        matrix, group, chunk = _strip(item, groups, chunks)
        W = address(table, matrix, 0, gl.bfloat16)
        key = gl.load(table + matrix * 7 + 5).to(gl.int32)
        factor = gl.load(factors + matrix)
        row = group * 128
        of_high, of_low = factor, factor
        if TALL and not TENSOR:
            of_row = scalings + matrix * M + row + inside
            of_high = gl.load(of_row, mask=row + inside < M, other=0.0)[:, None] * factor
            of_low = gl.load(of_row + 64, mask=row + 64 + inside < M, other=0.0)[:, None] * factor
        mbarrier.wait(strip_full, (item // gl.num_programs(0)) & 1)
        start = chunk * SPAN * 64
        tiles = gl.cdiv(gl.minimum(start + SPAN * 64, N) - start, 64)
        # Tiles are counted over all strips, so that the ring and the turns run on.
        for t in range((worker - before % WORKERS + WORKERS) % WORKERS, tiles, WORKERS):
            j = before + t
            s = j % STAGES
            column = start + t * 64
            mbarrier.wait(full.index(s), (j // STAGES) & 1)
            zero = gl.zeros([64, 64], gl.float32, mma)
            X_DN = X_ring.index(s)
            high = warpgroup_mma(Y_high.permute((1, 0)), X_DN, zero, use_acc=False, is_async=True)
            low = warpgroup_mma(Y_low.permute((1, 0)), X_DN, zero, use_acc=False, is_async=True)
            W_high, W_low = high_ring.index(s).load(mma), low_ring.index(s).load(mma)
            counter = (group * 64 + inside)[:, None] * N + (column + across)[None, :]
            words = random_words(counter, key, noise)
            high, low = warpgroup_mma_wait(0, deps=[high, low])
            mbarrier.arrive(empty.index(s), count=1)
            if TALL or TENSOR:
                s_high, s_low = of_high, of_low
            else:
                of_column = scalings + matrix * N + column + across
                s_high = gl.load(of_column, mask=column + across < N, other=0.0)[None, :] * factor
                s_low = s_high
            place = W + ((row + down)[:, None] * w_row + (column + along)[None, :])
            mask = (row + down < M)[:, None] & (column + along < N)[None, :]
            _written(W_high, high, s_high, place, mask, decay, words & 0xFFFF, COMPAT)
            mask = (row + 64 + down < M)[:, None] & (column + along < N)[None, :]
            _written(W_low, low, s_low, place + 64 * w_row, mask, decay, words >> 16, COMPAT)
        mbarrier.arrive(strip_empty, count=1)
        before += tiles


@gluon.jit
def move_factored(
    table, scalings, factors, dials, M, N, D, w_row, stride_x, stride_y, items, groups, chunks,
    TALL: gl.constexpr, TENSOR: gl.constexpr, COMPAT: gl.constexpr,
    DEPTH: gl.constexpr, SPAN: gl.constexpr, STAGES: gl.constexpr, WORKERS: gl.constexpr,
):  # fmt: skip
    """Move all rows of W; DEPTH is D or more, a multiple of 64."""
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    X_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, DEPTH, 64], shared)
    high_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, 64], shared)
    low_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, 64], shared)
    Y_high = gl.allocate_shared_memory(gl.bfloat16, [DEPTH, 64], shared)
    Y_low = gl.allocate_shared_memory(gl.bfloat16, [DEPTH, 64], shared)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    strip_full = gl.allocate_shared_memory(gl.int64, [1], bars)
    strip_empty = gl.allocate_shared_memory(gl.int64, [1], bars)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=128)
        mbarrier.init(empty.index(s), count=1)
    mbarrier.init(strip_full, count=128)
    mbarrier.init(strip_empty, count=WORKERS)
    ring = (X_ring, high_ring, low_ring, Y_high, Y_low, full, empty, strip_full, strip_empty)
    copied = (table, M, N, D, w_row, stride_x, stride_y, items, groups, chunks)
    given = (table, scalings, factors, dials, M, N, w_row, items, groups, chunks)
    if WORKERS == 2:
        gl.warp_specialize(
            [
                (_multiply, (0, given, ring, TALL, TENSOR, COMPAT, SPAN, STAGES, WORKERS)),
                (_multiply, (1, given, ring, TALL, TENSOR, COMPAT, SPAN, STAGES, WORKERS)),
                (_copy, (copied, ring, DEPTH, SPAN, STAGES)),
            ],
            [4, 4],
            [208, 56],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (0, given, ring, TALL, TENSOR, COMPAT, SPAN, STAGES, WORKERS)),
                (_multiply, (1, given, ring, TALL, TENSOR, COMPAT, SPAN, STAGES, WORKERS)),
                (_multiply, (2, given, ring, TALL, TENSOR, COMPAT, SPAN, STAGES, WORKERS)),
                (_copy, (copied, ring, DEPTH, SPAN, STAGES)),
            ],
            [4, 4, 4],
            [152, 152, 56],
        )
