"""The kernels of merging against what they stand in for, bit for bit, on CUDA or interpreted."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vectors.tasks import linear
from vectors.tasks.election import amounts
from vectors.tasks.histograms import Histogram
from vectors.tasks.methods.ties import TiesParameters

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
if find_spec("triton") is None:
    pytest.skip("Triton is not installed on this machine", allow_module_level=True)
from steer_kernels import merge  # noqa: E402  # which way it runs is decided on import

DEVICE = "cuda" if CUDA else "cpu"
SIZES = [1, 17, 1024, 3001]
POISON = 0x7FC1  # bits that are not a number
KINDS = ("fine", "coarse", "edges")


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int16)


def weights_of(kind: str, size: int, terms: int) -> tuple[Tensor, Tensor]:
    """bf16 base `[P]` and tuned `[K, P]`: with ties everywhere, or with what is rare in weights."""
    rng = torch.Generator().manual_seed(size + terms)
    base_P = (0.02 * torch.randn(size, generator=rng)).bfloat16()
    noise_KP = 0.002 * torch.randn(terms, size, generator=rng)
    if kind == "coarse":
        # Equal magnitudes and sums of exactly 0 are the rule.
        base_P = 0.25 * torch.randint(-4, 5, (size,), generator=rng).bfloat16()
        noise_KP = 0.25 * torch.randint(-2, 3, (terms, size), generator=rng).float()
    tuned_KP = (base_P.float() + noise_KP).bfloat16()
    if kind == "edges":
        rare = [0.0, -0.0, float("inf"), float("nan"), 1e-40, -1e-40, 3e38, -3e38, 1e-30]
        where = torch.randint(0, size, (min(size, 200),), generator=rng)
        base_P[where] = torch.tensor(rare).bfloat16().repeat(30)[: len(where)]
        tuned_KP[:, where] = base_P[where]
        # Signed zeros, and steps among the smallest numbers that there are.
        small = base_P[where].abs() < 1e-20
        moved = torch.randint(0, 99, (terms, int(small.sum())), generator=rng).to(torch.int16)
        tuned_KP[:, where[small]] = (
            bits(base_P[where[small]]).bitwise_xor(moved).view(torch.bfloat16)
        )
    return base_P, tuned_KP


def plainly_fused(
    base_P: Tensor, tuned_KP: Tensor, cuts_K: np.ndarray, dials: tuple[Any, ...], winner: int
) -> tuple[Tensor, int]:
    from vectors.tasks import fast

    out_P = np.empty(len(base_P), np.uint16)
    patterns = (bits(x.contiguous()).numpy().view(np.uint16) for x in (base_P, tuned_KP))
    ballots, gains, shares, fixed, by_count, largest, scale = dials
    tally = fast.fuse_bf16(
        *patterns, cuts_K, ballots, gains, shares, np.float32(fixed), by_count, largest,
        np.float32(winner), np.float32(scale), out_P,
    )  # fmt: skip
    return torch.from_numpy(out_P.view(np.int16)), tally


def dials_of(options: dict[str, Any], weights: tuple[float, ...]) -> tuple[Any, ...]:
    """Ballots, gains, amounts, fixed divisor, vote by count, the largest alone, scale."""
    asked = TiesParameters(**options)
    shares, fixed = amounts(weights, asked)
    own, ones = np.array(weights, np.float32), np.ones(len(weights), np.float32)
    weighted = asked.election == "weighted"
    return (
        own if weighted else ones, ones if weighted else own, np.array(shares, np.float32), fixed,
        asked.vote == "count", asked.combine == "max", asked.scale,
    )  # fmt: skip


OPTIONS: list[dict[str, Any]] = [
    {},
    {"scale": -0.3},
    {"election": "unweighted", "divisor": "weights"},
    {"election": "unweighted", "divisor": "terms", "vote": "count"},
    {"divisor": "signed-weights", "vote": "count", "scale": 1.7},
    {"divisor": "none"},
    {"combine": "max", "scale": -0.3},
    {"combine": "max", "election": "unweighted", "vote": "count"},
]
WEIGHTS = [(1.0,), (-0.5,), (1.0, 1.0, 1.0), (1.0, -0.5, 0.7), (0.3, -1.2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ties_has_the_bits_of_the_compiled_loops(options: dict[str, Any], kind: str) -> None:
    turn = OPTIONS.index(options) + KINDS.index(kind)
    for number, weights in enumerate(WEIGHTS, turn):
        size, winner = SIZES[-1 - number % len(SIZES)], (0, 1, -1)[number % 3]
        base_P, tuned_KP = weights_of(kind, size, len(weights))
        dials = dials_of(options, weights)
        size_KP = (tuned_KP.float() - base_P.float()).abs()
        cuts = [x[x.isfinite()].quantile(0.3 + 0.1 * number % 0.6) for x in size_KP]
        cuts_K = torch.stack(cuts).float()
        wanted_P, wanted = plainly_fused(
            base_P, tuned_KP, cuts_K.numpy().view(np.uint32), dials, winner
        )
        # Rows that lie apart, with something else between them.
        apart_KQ = torch.full((len(weights), size + 33), POISON, dtype=torch.int16, device=DEVICE)
        apart_KQ[:, :size] = bits(tuned_KP).to(DEVICE)
        out_P = torch.full((size + 5,), POISON, dtype=torch.int16, device=DEVICE)
        tally = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        ballots, gains, shares, fixed, by_count, largest, scale = dials
        sent = [torch.from_numpy(x).to(DEVICE) for x in (ballots, gains, shares)]
        plain = tuple(bool((x == 1).all()) for x in (ballots, gains, shares))
        given = bits(base_P).to(DEVICE), apart_KQ[:, :size], cuts_K.to(DEVICE), *sent
        merge.fuse_bf16(*given, fixed, by_count, largest, winner, scale, out_P[:size], tally, plain)
        assert torch.equal(out_P[:size].cpu(), wanted_P)
        assert (out_P[size:] == POISON).all()
        assert int(tally) == wanted
        merge.fuse_bf16(*given, fixed, by_count, largest, winner, scale, None, tally)
        assert int(tally) == 2 * wanted
        assert torch.equal(apart_KQ[:, :size].cpu(), bits(tuned_KP))
        # In place of a term, and with products that are not left out.
        merge.fuse_bf16(*given, fixed, by_count, largest, winner, scale, apart_KQ[-1, :size])
        assert torch.equal(apart_KQ[-1, :size].cpu(), wanted_P)
        assert (apart_KQ[:, size:] == POISON).all()


def often_of(counts_B: np.ndarray, size: int) -> tuple[Tensor, Tensor]:
    """The places of the `size` fullest bins, and their numbers; bins that are empty are among them."""
    often_H = torch.from_numpy(np.argsort(counts_B, stable=True)[-size:].astype(np.int32))
    slots_B = torch.full((merge.BINS,), size, dtype=torch.int16)
    slots_B[often_H.long()] = torch.arange(size, dtype=torch.int16)
    return slots_B.to(DEVICE), often_H.to(DEVICE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_counts_are_those_of_the_compiled_loop(kind: str, size: int) -> None:
    from vectors.tasks import fast

    base_P, (tuned_P,) = weights_of(kind, size, 1)
    counts_B, loose_P = np.zeros(merge.BINS, np.uint32), np.empty(size, np.uint32)
    patterns = [bits(x).numpy().view(np.uint16) for x in (base_P, tuned_P)]
    held = fast.count_bf16(*patterns, counts_B, loose_P)
    assert held >= 0
    counts_CB = torch.zeros(3, merge.BINS, dtype=torch.int32, device=DEVICE)
    loose_L = torch.full((size + 3,), -1, dtype=torch.int32, device=DEVICE)
    tallies_3 = torch.zeros(merge.TALLIES, dtype=torch.int64, device=DEVICE)
    sent = [bits(x).to(DEVICE) for x in (base_P, tuned_P)]
    often = often_of(counts_B, 4)
    merge.count_bf16(*sent, counts_CB, loose_L, tallies_3, *often)
    found_B = counts_CB.sum(0).cpu().numpy()
    found_B[0] += int(tallies_3[merge.ZERO])
    assert (found_B == counts_B).all()
    assert tallies_3[1:].tolist() == [held, 0]
    assert (loose_L[:held].sort().values.cpu().numpy() == np.sort(loose_P[:held])).all()
    assert (loose_L[held:] == -1).all()
    # No place for all of them: how many there are is known, and nothing is written behind.
    short_L = torch.full((held // 2 + 4,), -1, dtype=torch.int32, device=DEVICE)
    merge.count_bf16(*sent, counts_CB, short_L[: held // 2], tallies_3, *often)
    assert tallies_3[1:].tolist() == [2 * held, 0]
    assert (short_L[held // 2 :] == -1).all()


@pytest.mark.parametrize("kind", ["fine", "edges"])
def test_a_look_at_one_bin_gives_every_rank_in_it(kind: str) -> None:
    base_P, (tuned_P,) = weights_of(kind, 3001, 1)
    delta_P = torch.where(bits(tuned_P) == bits(base_P), 0.0, tuned_P.float() - base_P.float())
    sizes_P = np.sort(delta_P.abs().numpy().view(np.uint32))
    loose_L = sizes_P[sizes_P & 0xFFF != 0]
    histogram = Histogram.of(np.bincount(sizes_P >> 12, minlength=merge.BINS), [loose_L])
    for number in {int(x) >> 12 for x in loose_L[:: len(loose_L) // 5]}:
        counts_UF = torch.zeros(2, merge.FINE, dtype=torch.int64, device=DEVICE)
        rows_U, numbers_U = torch.tensor([[2, 0], [number, number + 1]]).int().to(DEVICE)
        tuned_KP = torch.stack([base_P, base_P, tuned_P])
        merge.look(bits(base_P).to(DEVICE), bits(tuned_KP).to(DEVICE), rows_U, numbers_U, counts_UF)
        counts_F = counts_UF[0]
        assert not counts_UF[1].any()
        wanted_F = np.bincount(loose_L[loose_L >> 12 == number] & 0xFFF, minlength=merge.FINE)
        assert counts_F.cpu().numpy().tolist() == wanted_F.tolist()
        assert counts_F.sum() <= histogram.counts_B[histogram.bins_B == number].sum()


def test_differences_that_are_not_finite_are_told() -> None:
    base_P, (tuned_P,) = weights_of("edges", 1024, 1)
    tuned_P[7], tuned_P[1023] = float("inf"), float("nan")
    counts_CB = torch.zeros(2, merge.BINS, dtype=torch.int32, device=DEVICE)
    loose_L = torch.empty(1024, dtype=torch.int32, device=DEVICE)
    tallies_3 = torch.zeros(merge.TALLIES, dtype=torch.int64, device=DEVICE)
    merge.count_bf16(
        bits(base_P).to(DEVICE), bits(tuned_P).to(DEVICE), counts_CB, loose_L, tallies_3,
        *often_of(np.zeros(merge.BINS), 16),
    )  # fmt: skip
    assert int(tallies_3[merge.INFINITE]) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [(-0.5,), (1.0, 1.0, 1.0), (1.0, -0.5, 0.7, 1e-3)], ids=str)
def test_the_weighted_sum_has_the_bits_of_its_reference(
    kind: str, weights: tuple[float, ...]
) -> None:
    for size in SIZES:
        base_P, tuned_KP = weights_of(kind, size, len(weights))
        tuned_KP[0, size // 2] = float("inf")
        wanted_P = linear.combine(base_P, list(zip(weights, tuned_KP, strict=True)))
        out_P = torch.full((size + 5,), POISON, dtype=torch.int16, device=DEVICE)
        merge.combine(
            bits(base_P).to(DEVICE), bits(tuned_KP).to(DEVICE),
            torch.tensor(weights, device=DEVICE), out_P[:size],
        )  # fmt: skip
        found_P = out_P[:size].cpu().view(torch.bfloat16)
        unknown = wanted_P.isnan() & (base_P.isfinite() | (bits(wanted_P) != bits(base_P)))
        assert found_P[unknown].isnan().all()
        assert torch.equal(bits(found_P)[~unknown], bits(wanted_P)[~unknown])
        assert (out_P[size:] == POISON).all()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="the correction needs a fused product, which only CUDA has")
def test_means_round_as_divisions_do() -> None:
    """Six terms that agree, so that counts go from 1 to 6, over all that fp32 deltas can be."""
    rng = torch.Generator().manual_seed(0)
    terms, size = 6, 1 << 20
    patterns = torch.randint(-(1 << 15), 1 << 15, (terms, size), generator=rng).to(torch.int16)
    tuned_KP = patterns.view(torch.bfloat16)
    tuned_KP[~(tuned_KP.abs() < 1e37)] = 0.0
    # Of one size, down to the smallest numbers, so that sums do not swallow their terms.
    tuned_KP[1:] = (tuned_KP[:1].float() * (1 + torch.rand(5, size, generator=rng))).bfloat16()
    tuned_KP[torch.rand(terms, size, generator=rng) < 0.3] = 0.0
    base_P = torch.zeros(size).bfloat16()
    dials = dials_of({}, (1.0,) * terms)
    wanted_P, _ = plainly_fused(base_P, tuned_KP, np.zeros(terms, np.uint32), dials, 0)
    out_P = torch.empty(size, dtype=torch.int16, device=DEVICE)
    ones_K = torch.ones(terms, device=DEVICE)
    merge.fuse_bf16(
        bits(base_P).to(DEVICE), bits(tuned_KP).to(DEVICE), torch.zeros(terms, device=DEVICE),
        ones_K, ones_K, ones_K, 0.0, False, False, 0.0, 1.0, out_P, None, (True, True, True),
    )  # fmt: skip
    assert torch.equal(out_P.cpu(), wanted_P)
