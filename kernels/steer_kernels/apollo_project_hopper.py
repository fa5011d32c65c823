"""`apollo_dense.project` and `apollo_factored.project_factored` for bfloat16 on Hopper, in Gluon.

    R = G P      G [C, S] the gradient and P [S, R] the signs, or G = A^T [C, D] and P = Z [D, R]

A program stays on its multiprocessor and takes one block of 128 channels after the other. Four warps
copy tiles of G and P into a ring in shared memory; two groups of four warps take 64 channels each:
they multiply from the ring, square what they hold in registers meanwhile, and find the moments of
their channels in the same ring, so that nothing waits at the end of a block. Triton's own pipeline
can copy ahead neither across the end of a loop nor for a tile that is multiplied and squared.

Shape letters: C channels, S the other side, R the rank.
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

from steer_kernels.apollo_parts import address

__all__ = ["project"]

PIECES = gl.constexpr(8)  # in which a block's moments pass through the ring: m and v fill a stage


@gluon.jit
def _moments(P_ring, s, RANK: gl.constexpr):
    """Return stage `s` as m and v of the one half of the channels, then of the other."""
    WIDE: gl.constexpr = RANK // PIECES
    rows: gl.constexpr = gl.SwizzledSharedLayout(4, 1, WIDE // 4, [1, 0])
    return P_ring.index(s)._reinterpret(gl.float32, [4, 64, WIDE], rows)


@gluon.jit
def _copy(
    copied, ring,
    FIELD: gl.constexpr, ROWWISE: gl.constexpr, RANK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    table, P, P_rows, C, S, stride, items, blocks = copied
    G_ring, P_ring, full, empty = ring
    WIDE: gl.constexpr = RANK // PIECES
    tile: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // RANK, RANK // 8], [4, 1], [1, 0])
    fine: gl.constexpr = gl.BlockedLayout([1, 4], [128 // WIDE, WIDE // 4], [4, 1], [1, 0])
    far = gl.arange(0, 64, layout=gl.SliceLayout(1, tile))
    near = gl.arange(0, 64, layout=gl.SliceLayout(0, tile))
    k = gl.arange(0, 32, layout=gl.SliceLayout(1, wide))
    r = gl.arange(0, RANK, layout=gl.SliceLayout(0, wide))
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, fine))
    column = gl.arange(0, WIDE, layout=gl.SliceLayout(0, fine))
    j = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        matrix, block = (item // blocks).to(gl.int64), item % blocks
        G = address(table, matrix, FIELD, gl.bfloat16)
        of_matrix = P + matrix * (P_rows * RANK)
        m, v = address(table, matrix, 2, gl.float32), address(table, matrix, 3, gl.float32)
        for begin in range(0, S, 64):
            s = j % STAGES
            mbarrier.wait(empty.index(s), ((j // STAGES) & 1) ^ 1)
            for half in gl.static_range(2):
                c = block * 128 + half * 64
                if ROWWISE:
                    place = (c + far)[:, None] * stride + (begin + near)[None, :]
                    mask = (c + far < C)[:, None] & (begin + near < S)[None, :]
                else:
                    place = (begin + far)[:, None] * stride + (c + near)[None, :]
                    mask = (begin + far < S)[:, None] & (c + near < C)[None, :]
                async_copy.async_copy_global_to_shared(G_ring.index(2 * s + half), G + place, mask)
            for first in gl.static_range(0, 64, 32):
                place = (begin + first + k)[:, None] * RANK + r[None, :]
                target = P_ring.index(s).slice(first, 32)
                mask = (begin + first + k < S)[:, None] & (r < RANK)[None, :]
                async_copy.async_copy_global_to_shared(target, of_matrix + place, mask)
            async_copy.mbarrier_arrive(full.index(s), increment_count=False)
            j += 1
        for piece in range(PIECES):
            s = j % STAGES
            mbarrier.wait(empty.index(s), ((j // STAGES) & 1) ^ 1)
            kept = _moments(P_ring, s, RANK)
            for half in gl.static_range(2):
                c = block * 128 + half * 64 + row
                place = c[:, None] * RANK + (piece * WIDE + column)[None, :]
                mask = (c < C)[:, None] & (column < WIDE)[None, :]
                async_copy.async_copy_global_to_shared(kept.index(2 * half), m + place, mask)
                async_copy.async_copy_global_to_shared(kept.index(2 * half + 1), v + place, mask)
            async_copy.mbarrier_arrive(full.index(s), increment_count=False)
            j += 1
    async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit
def _advance(
    R_CR, first_piece: gl.constexpr, half: gl.constexpr, j, c, C, m, v, rule, widen, ring,
    RANK: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Advance the moments of 64 channels, piece by piece; return the squares of Q and R."""
    WIDE: gl.constexpr = RANK // PIECES
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    if COLUMNS > WIDE:
        some: gl.constexpr = COLUMNS // 2
        pair = gl.permute(gl.reshape(R_CR, (64, 2, some)), (0, 2, 1))
        left, right = gl.split(pair)
        q0, r0 = _advance(
            left, first_piece, half, j, c, C, m, v, rule, widen, ring, RANK, some, STAGES
        )  # fmt: skip
        q1, r1 = _advance(
            right, first_piece + some // WIDE, half, j, c, C, m, v, rule, widen, ring,
            RANK, some, STAGES,
        )  # fmt: skip
        q_C, r_C = q0 + q1, r0 + r1
    else:
        root, new1, keep2, new2, eps = rule
        _, P_ring, full, empty = ring
        R_CR = gl.convert_layout(R_CR, mma) * root
        stage = j + first_piece
        s = stage % STAGES
        mbarrier.wait(full.index(s), (stage // STAGES) & 1)
        kept = _moments(P_ring, s, RANK)
        first_CR, second_CR = kept.index(2 * half).load(mma), kept.index(2 * half + 1).load(mma)
        mbarrier.arrive(empty.index(s), count=1)
        first_CR += (R_CR - first_CR) * new1
        second_CR = second_CR * keep2 + R_CR * R_CR * new2
        row = c + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
        column = first_piece * WIDE + gl.arange(0, WIDE, layout=gl.SliceLayout(0, mma))
        place = row[:, None] * RANK + column[None, :]
        gl.store(m + place, first_CR, mask=(row < C)[:, None])
        gl.store(v + place, second_CR, mask=(row < C)[:, None])
        Q_CR = first_CR / (gl.sqrt(second_CR) * widen + eps)
        q_C, r_C = gl.sum(Q_CR * Q_CR, axis=1), gl.sum(R_CR * R_CR, axis=1)
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    return gl.convert_layout(q_C, rows), gl.convert_layout(r_C, rows)


@gluon.jit
def _multiply(
    half: gl.constexpr, given, rule, ring,
    ROWWISE: gl.constexpr, RANK: gl.constexpr, SQUARE: gl.constexpr, TENSOR: gl.constexpr,
    COMPAT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    table, scalings, sums_q, sums_r, sums_u, dials, C, S, items, blocks = given
    root, new1, keep2, new2, eps = rule
    G_ring, P_ring, full, empty = ring
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, RANK, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    widen = 1.0
    if not COMPAT:
        correct1 = gl.load(dials + 2)
        widen = correct1 / gl.load(dials + 3)
        eps *= correct1
    j = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        matrix, block = (item // blocks).to(gl.int64), item % blocks
        R_CR = gl.zeros([64, RANK], gl.float32, mma)
        square_CS = gl.zeros([64, 64], gl.float32, operand)
        for _ in range(0, S, 64):
            s = j % STAGES
            # Copies need no fence before the product reads them; Triton's own pipeline has none.
            mbarrier.wait(full.index(s), (j // STAGES) & 1)
            G = G_ring.index(2 * s + half)
            if not ROWWISE:
                G = G.permute((1, 0))
            G_CS = G.load(operand)
            running = warpgroup_mma(G_CS, P_ring.index(s), R_CR, is_async=True)
            if SQUARE:
                wide_CS = G_CS.to(gl.float32)
                square_CS += wide_CS * wide_CS
            R_CR = warpgroup_mma_wait(0, deps=[running])
            mbarrier.arrive(empty.index(s), count=1)
            j += 1
        c = block * 128 + half * 64
        q_C, r_C = _advance(
            R_CR, 0, half, j, c, C, address(table, matrix, 2, gl.float32),
            address(table, matrix, 3, gl.float32), (root, new1, keep2, new2, eps), widen, ring,
            RANK, RANK, STAGES,
        )  # fmt: skip
        j += PIECES
        scaling_C = gl.sqrt(q_C) / (gl.sqrt(r_C) + 1e-8)
        row = c + gl.arange(0, 64, layout=rows)
        if not TENSOR or not SQUARE:
            gl.store(scalings + matrix * C + row, scaling_C, mask=row < C)
        place = (matrix * blocks + block) * 2 + half
        gl.store(sums_q + place, gl.sum(q_C, axis=0))
        gl.store(sums_r + place, gl.sum(r_C, axis=0))
        if SQUARE:
            square_C = gl.convert_layout(gl.sum(square_CS, axis=1), rows)
            if not TENSOR:
                square_C *= scaling_C * scaling_C
            gl.store(sums_u + place, gl.sum(square_C, axis=0))


@gluon.jit
def project(
    table, P, P_rows, scalings, sums_q, sums_r, sums_u, dials, C, S, stride,
    root, new1, keep2, new2, eps, items, blocks,
    FIELD: gl.constexpr, ROWWISE: gl.constexpr, RANK: gl.constexpr, SQUARE: gl.constexpr,
    TENSOR: gl.constexpr, COMPAT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Project all channels, advance their moments, and store their scalings.

    `items` blocks of 128 channels, `blocks` a matrix; P of a matrix begins `P_rows` rows after the last one.
    ROWWISE says that channels are rows of G in memory, `stride` apart; otherwise they lie side by
    side. SQUARE says that norms of G are wanted. Sums are of 64 channels each.
    """
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    G_ring = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, 64, 64], shared)
    P_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 64, RANK], shared)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=128)
        mbarrier.init(empty.index(s), count=2)
    ring = (G_ring, P_ring, full, empty)
    given = (table, scalings, sums_q, sums_r, sums_u, dials, C, S, items, blocks)
    rule = (root, new1, keep2, new2, eps)
    copied = (table, P, P_rows, C, S, stride, items, blocks)
    gl.warp_specialize(
        [
            (_multiply, (0, given, rule, ring, ROWWISE, RANK, SQUARE, TENSOR, COMPAT, STAGES)),
            (_multiply, (1, given, rule, ring, ROWWISE, RANK, SQUARE, TENSOR, COMPAT, STAGES)),
            (_copy, (copied, ring, FIELD, ROWWISE, RANK, STAGES)),
        ],
        [4, 4],
        [232, 40],
    )
