"""The inner loops of merging bf16 task vectors: counting magnitudes, TIES, the weighted sum.

Bits are those of the references. No product and sum are fused, division rounds correctly, and each
element adds its terms in their order, so nothing depends on the order of the programs: what many
programs add to are integers. Every element is read once and written once.

Tensors are bit patterns of bf16, int16. Shape letters: P elements of a part, K terms, U of them, B bins,
C copies of a table, L places for loose magnitudes, H bins that occur often.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

__all__ = [
    "BINS",
    "COPIES",
    "FINE",
    "INFINITE",
    "LOOSE",
    "OFTEN",
    "TALLIES",
    "ZERO",
    "combine",
    "count_bf16",
    "fuse_bf16",
    "look",
]

LOW: tl.constexpr = tl.constexpr(12)
BINS = 1 << 19
FINE = 1 << 12
OFTEN = 256  # bins that a program counts for itself; they have nine magnitudes in ten
COPIES = 8  # of a table, since programs that add to one place wait for each other
ZERO, LOOSE, INFINITE, TALLIES = 0, 1, 2, 3
TOP: tl.constexpr = tl.constexpr(0x7F800000)
POSITIVE: tl.constexpr = tl.constexpr(0x7FFFFFFF)
SIGN: tl.constexpr = tl.constexpr(-0x80000000)
# Every launch parameter is decided here; `benchmarks/merge_gpu.py --tune` tries others.
TILES: dict[str, dict[str, Any]] = {
    "count": {"BLOCK": 4096, "num_warps": 8},
    "look": {"BLOCK": 4096, "num_warps": 8},
    "fuse": {"BLOCK": 512, "num_warps": 4},
    "combine": {"BLOCK": 2048, "num_warps": 8},
}
BY_COUNT, BY_AMOUNT, FIXED = 0, 1, 2


@triton.jit
def _wide(bits):
    """The fp32 of a bf16's bits."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _narrow(x, CAST: tl.constexpr):
    """The bits of the nearest bf16, halves to even."""
    if CAST:
        return x.to(tl.bfloat16).to(tl.int16, bitcast=True)
    # The interpreter's own cast does not round to even.
    bits = x.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)


@triton.jit
def _turned(x, turn):
    """`-x` where `turn` has the bit of the sign."""
    return (x.to(tl.int32, bitcast=True) ^ turn).to(tl.float32, bitcast=True)


@triton.jit
def _mean(total, count, K: tl.constexpr, CAST: tl.constexpr):
    """`total / count`, rounded once, of a count from 0 to K, where 0 has a total of 0."""
    if not CAST:
        # The interpreter has no fused product.
        return tl.div_rn(total, tl.maximum(count, 1.0))
    share = tl.full(total.shape, 1.0, tl.float32)
    for n in tl.static_range(2, K + 1):  # pyright: ignore[reportGeneralTypeIssues]
        share = tl.where(count >= n, 1.0 / n, share)
    # A quotient by a small integer lies far from the middle between two numbers, by 1 / 2n of their
    # distance, unless it is that middle: one step of correction, whose remainder is exact, rounds
    # as a division does.
    quotient = total * share
    rest = tl.fma(-count, quotient, total)
    return tl.fma(rest, share, quotient)


@triton.jit
def _count(
    base,
    tuned,
    table,
    copies,
    loose,
    room,
    tallies,
    slots,
    often,
    P,
    BINS: tl.constexpr,
    OFTEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < P
    old = tl.load(base + at, mask=inside, other=0)
    new = tl.load(tuned + at, mask=inside, other=0)
    difference = _wide(new) - _wide(old)
    bits = difference.to(tl.int32, bitcast=True) & POSITIVE
    # Bits that are equal are a difference of 0, infinities and not-a-numbers included.
    bits = tl.where(old == new, 0, bits)
    still = tl.sum((inside & (bits == 0)).to(tl.int32))
    tl.atomic_add(tallies, still.to(tl.int64), sem="relaxed")
    wrong = tl.sum((bits >= TOP).to(tl.int32))
    if wrong > 0:
        tl.atomic_add(tallies + 2, wrong.to(tl.int64), sem="relaxed")
    own = table + (tl.program_id(0) % copies).to(tl.int64) * BINS
    moves = (bits != 0) & (bits < TOP)
    number = bits >> LOW
    slot = tl.load(slots + number, mask=moves, other=0).to(tl.int32)
    frequent = moves & (slot < OFTEN)
    tl.atomic_add(own + number, 1, mask=moves & (slot >= OFTEN), sem="relaxed")
    found_H = tl.histogram(slot, OFTEN, mask=frequent)
    h = tl.arange(0, OFTEN)
    tl.atomic_add(own + tl.load(often + h), found_H, mask=found_H > 0, sem="relaxed")
    extra = ((bits & 0xFFF) != 0).to(tl.int32)
    some = tl.sum(extra)
    if some > 0:
        first = tl.atomic_add(tallies + 1, some.to(tl.int64), sem="relaxed")
        # Once there are too many to keep, none is needed.
        if first < room:
            place = first + tl.cumsum(extra, 0) - 1
            tl.store(loose + place, bits, mask=(extra != 0) & (place < room))


def count_bf16(
    base_P: Tensor,
    tuned_P: Tensor,
    counts_CB: Tensor,
    loose_L: Tensor,
    tallies_3: Tensor,
    slots_B: Tensor,
    often_H: Tensor,
) -> None:
    """Count `|tuned - base|` into bins: `vectors.tasks.fast.count_bf16`, without waiting for it.

    Magnitudes of 0 are counted in `tallies_3[ZERO]` and not in their bin. `tallies_3[LOOSE]` grows
    by how many have low bits, of which the first L are kept in `loose_L`, in any order;
    `tallies_3[INFINITE]` by how many differences are not finite.

    Args:
        counts_CB: int32, whose sum over the copies counts; no copy may get more than 2^31 - 1.
        loose_L: int32.
        tallies_3: int64.
        slots_B: int16, for each bin its place in `often_H`, or H where it has none; bins that have
            one are counted by each program for itself first.
        often_H: int32, numbers of bins; H a power of 2.
    """
    launch: Any = _count
    tile = TILES["count"]
    launch[(triton.cdiv(len(base_P), tile["BLOCK"]),)](
        base_P, tuned_P, counts_CB, counts_CB.shape[0], loose_L, len(loose_L), tallies_3, slots_B,
        often_H, len(base_P), BINS=counts_CB.shape[1], OFTEN=len(often_H), **tile,
    )  # fmt: skip


@triton.jit
def _look(
    base,
    tuned,
    stride,
    rows,
    numbers,
    counts,
    P,
    U: tl.constexpr,
    FINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < P
    old = tl.load(base + at, mask=inside, other=0)
    for u in tl.static_range(U):  # pyright: ignore[reportGeneralTypeIssues]
        row = tl.load(rows + u).to(tl.int64) * stride
        new = tl.load(tuned + row + at, mask=inside, other=0)
        bits = (_wide(new) - _wide(old)).to(tl.int32, bitcast=True) & POSITIVE
        low = bits & 0xFFF
        asked = inside & (old != new) & (bits >> LOW == tl.load(numbers + u)) & (low != 0)
        one = tl.full((BLOCK,), 1, tl.int64)
        tl.atomic_add(counts + u * FINE + low, one, mask=asked, sem="relaxed")


def look(
    base_P: Tensor, tuned_KP: Tensor, rows_U: Tensor, numbers_U: Tensor, counts_UF: Tensor
) -> None:
    """Count the low bits of the magnitudes of one bin of some terms, those without any left out.

    With the bin's own count this gives every rank in it: `vectors.tasks.histograms.Histogram.pick`.

    Args:
        rows_U: int32, the numbers of the terms.
        numbers_U: int32, of the bins.
        counts_UF: int64 [U, 4096].
    """
    launch: Any = _look
    tile = TILES["look"]
    launch[(triton.cdiv(len(base_P), tile["BLOCK"]),)](
        base_P, tuned_KP, tuned_KP.stride(0), rows_U, numbers_U, counts_UF, len(base_P),
        U=len(rows_U), FINE=FINE, **tile,
    )  # fmt: skip


@triton.jit(do_not_specialize=["fixed", "winner", "scale"])
def _fuse(
    base,
    tuned,
    stride,
    cuts,
    ballots,
    gains,
    amounts,
    fixed,
    winner,
    scale,
    tally,
    out,
    P,
    K: tl.constexpr,
    VOTES: tl.constexpr,
    LARGEST: tl.constexpr,
    DIVISOR: tl.constexpr,
    BALLOTS: tl.constexpr,
    GAINS: tl.constexpr,
    SCALE: tl.constexpr,
    WINNER: tl.constexpr,
    TALLY: tl.constexpr,
    STORE: tl.constexpr,
    CAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < P
    old_bits = tl.load(base + at, mask=inside, other=0)
    old = _wide(old_bits)
    votes = ()
    elected = tl.zeros((BLOCK,), tl.float32)
    new_bits = old_bits
    for k in tl.static_range(K):
        row = tl.full((), k, tl.int64) * stride
        new_bits = tl.load(tuned + row + at, mask=inside, other=0)
        vote = _wide(new_bits) - old
        # False where the difference is not a number: infinities, of which the count has shown that
        # they did not move.
        kept = tl.abs(vote) >= tl.load(cuts + k)
        if BALLOTS:
            vote = vote * tl.load(ballots + k)
        vote = tl.where(kept, vote, 0.0)
        votes = votes + (vote,)  # noqa: RUF005  # Triton unpacks no tuple in another
        if VOTES:
            elected += tl.where(vote > 0, 1.0, tl.where(vote < 0, -1.0, 0.0))
        else:
            elected += vote
    if TALLY:
        signs = (elected > 0).to(tl.int32) - (elected < 0).to(tl.int32)
        tl.atomic_add(tally, tl.sum(signs).to(tl.int64), sem="relaxed")
    if STORE:
        if WINNER:
            elected = tl.where(elected == 0, winner, elected)
        # Terms that agree are positive once all are turned by the elected sign.
        turn = elected.to(tl.int32, bitcast=True) & SIGN
        total = tl.zeros((BLOCK,), tl.float32)
        divisor = tl.zeros((BLOCK,), tl.float32)
        for k in tl.static_range(K):
            value = _turned(votes[k], turn)
            agrees = value > 0
            if GAINS:
                value = tl.where(agrees, value * tl.load(gains + k), 0.0)
            else:
                value = tl.maximum(value, 0.0)
            if LARGEST:
                total = tl.where(tl.abs(value) > tl.abs(total), value, total)
            else:
                total += value
                if DIVISOR == 0:
                    divisor += tl.where(agrees, 1.0, 0.0)
                elif DIVISOR == 1:
                    divisor += tl.where(agrees, tl.load(amounts + k), 0.0)
        if not LARGEST:
            if DIVISOR == 0:
                total = _mean(total, divisor, K, CAST)
            elif DIVISOR == 1:
                quotient = tl.div_rn(total, tl.where(divisor == 0, 1.0, divisor))
                total = tl.where(divisor == 0, 0.0, quotient)
            else:
                total = tl.div_rn(total, tl.full((BLOCK,), 0.0, tl.float32) + fixed)
        total = _turned(total, turn)
        scaled = total * scale if SCALE else total
        still = (scaled == 0) | (elected == 0)
        result = tl.where(still, old_bits, _narrow(old + scaled, CAST))
        if K == 1:
            # Where the only term comes out as it went in, so do its bits.
            same = (scaled == _wide(new_bits) - old) & (still == 0)
            result = tl.where(same, new_bits, result)
        tl.store(out + at, result, mask=inside)


def fuse_bf16(
    base_P: Tensor,
    tuned_KP: Tensor,
    cuts_K: Tensor,
    ballots_K: Tensor,
    gains_K: Tensor,
    amounts_K: Tensor,
    fixed: float,
    by_count: bool,
    largest: bool,
    winner: float,
    scale: float,
    out_P: Tensor | None,
    tally: Tensor | None = None,
    plain: tuple[bool, bool, bool] = (False, False, False),
) -> None:
    """Write `base + TIES` to `out_P`: `vectors.tasks.fast.fuse_bf16`, without waiting for it.

    Args:
        tuned_KP: whose rows may lie apart; `out_P` may be one of them.
        cuts_K: fp32.
        tally: int64 [1], to which the sum of the elected signs is added.
        plain: whether all ballots, all gains, all amounts are 1, which saves their products.
    """
    launch: Any = _fuse
    tile = TILES["fuse"]
    out = base_P if out_P is None else out_P
    launch[(triton.cdiv(len(base_P), tile["BLOCK"]),)](
        base_P, tuned_KP, tuned_KP.stride(0), cuts_K, ballots_K, gains_K, amounts_K,
        float(fixed), float(winner), float(scale), out if tally is None else tally, out,
        len(base_P), K=len(tuned_KP), VOTES=by_count, LARGEST=largest,
        DIVISOR=FIXED if fixed else (BY_COUNT if plain[2] else BY_AMOUNT),
        BALLOTS=not plain[0], GAINS=not plain[1], SCALE=scale != 1, WINNER=winner != 0,
        TALLY=tally is not None, STORE=out_P is not None, CAST=_casts(),
        enable_fp_fusion=False, **tile,
    )  # fmt: skip


@triton.jit
def _combine(
    base,
    tuned,
    stride,
    weights,
    out,
    P,
    K: tl.constexpr,
    CAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < P
    old_bits = tl.load(base + at, mask=inside, other=0)
    old = _wide(old_bits)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        row = tl.full((), k, tl.int64) * stride
        new_bits = tl.load(tuned + row + at, mask=inside, other=0)
        difference = tl.where(new_bits == old_bits, 0.0, _wide(new_bits) - old)
        total += difference * tl.load(weights + k)
    result = tl.where(total == 0, old_bits, _narrow(old + total, CAST))
    tl.store(out + at, result, mask=inside)


def combine(base_P: Tensor, tuned_KP: Tensor, weights_K: Tensor, out_P: Tensor) -> None:
    """Write `base + sum_i weight_i * (tuned_i - base)` to `out_P`: `vectors.tasks.linear.combine`.

    One term of weight exactly 1 is the caller's to copy. What is not a number has other bits.
    """
    launch: Any = _combine
    tile = TILES["combine"]
    launch[(triton.cdiv(len(base_P), tile["BLOCK"]),)](
        base_P, tuned_KP, tuned_KP.stride(0), weights_K, out_P, len(base_P),
        K=len(tuned_KP), CAST=_casts(), enable_fp_fusion=False, **tile,
    )  # fmt: skip


def _casts() -> bool:
    """Whether the kernels are compiled; the interpreter's cast to bf16 rounds in another way."""
    return torch.cuda.is_available() and not knobs.runtime.interpret
