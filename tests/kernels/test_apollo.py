"""The kernels of APOLLO against their references, through Triton's interpreter on the CPU."""

from __future__ import annotations

import math
import os
import weakref
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from steer_kernels import apollo as kernels
from steer_kernels import apollo_buckets

from workbench.train import apollo_steps as reference
from workbench.train.projection import projection

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = {
    "project": {"ROWS": 64, "STEP": 32, "num_warps": 4, "num_stages": 2},
    "move": {"ROWS": 32, "COLUMNS": 64, "num_warps": 4, "num_stages": 1},
    "move_adamw": {"BLOCK": 256, "num_warps": 4, "num_stages": 1},
    "shrink": {"ROWS": 16, "STEP": 32, "num_warps": 4, "num_stages": 2},
    "project_factored": {"ROWS": 64, "COLUMNS": 32, "STEP": 32, "num_warps": 4, "num_stages": 2},
    "norm_factored": {"SIDE": 16, "STEP": 32, "num_warps": 4, "num_stages": 2},
    "move_factored": {"COLUMNS": 32, "STEP": 32, "num_warps": 4, "num_stages": 2},
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles of every kernel on small matrices, and no table left from another test."""
    for name, tile in SMALL.items():
        monkeypatch.setitem(kernels.TILES, name, tile)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Whatever the launcher leaves unwritten is NaN."""
    plain = torch.empty

    def empty(*shape, **options):
        return plain(*shape, **options).fill_(math.nan)

    monkeypatch.setattr(torch, "empty", empty)


def noise(shape: tuple[int, ...], seed: int, dtype=torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


class Job:
    """Some matrices with moments and the rule of their steps, for one implementation."""

    def __init__(self, weights: list[Tensor], rank: int, projected=True, **rule) -> None:
        self.weights, self.rank = weights, rank
        wide = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
        shape = (lambda w: (max(w.shape), rank)) if projected else (lambda w: w.shape)
        new = lambda s: torch.zeros(s, dtype=wide, device=DEVICE)  # noqa: E731
        self.moments = [[new(shape(w)) for w in weights] for _ in range(2)]
        self.norms = [torch.full((), math.inf, dtype=wide, device=DEVICE) for _ in weights]
        self.rule = {"scaling": "channel", "scale": "auto", "limiter": 1.01, "compat": False}
        self.rule |= {"betas": (0.9, 0.999), "eps": 1e-8} | rule
        self.wide, self.projected, self.steps = wide, projected, 0

    def go(self, module, gradients: list[tuple[Tensor, ...]]) -> None:
        self.steps += 1
        dials = reference.make_dials(
            1e-2, 0.1, self.rule["betas"], self.steps, 1234567 * self.steps - 9, self.wide
        ).to(DEVICE)
        keys = [7919 * (i + 1) * (-1) ** i for i in range(len(self.weights))]
        arguments = [self.weights, *map(list, zip(*gradients, strict=True)), *self.moments]
        if self.projected:
            small = max(min(w.shape) for w in self.weights)
            signs = projection(self.rank, small, 3, self.steps // 3, DEVICE, self.weights[0].dtype)
            arguments += [self.norms, keys, signs]
        else:
            arguments.append(keys)
        name = "adamw" if not self.projected else "dense" if len(gradients[0]) == 1 else "factored"
        getattr(module, f"{name}_step")(*arguments, dials, **self.rule)


def compare(weights: list[Tensor], gradients, rank=4, steps=3, projected=True, **rule) -> None:
    """Take steps with the kernels in float32 and with the reference in float64."""
    ours = Job([w.clone() for w in weights], rank, projected, **rule)
    exact = Job([w.double() for w in weights], rank, projected, **rule)
    for step in range(steps):
        given = gradients(step)
        ours.go(kernels, given)
        exact.go(reference, [tuple(g.double() for g in each) for each in given])
    for found, wanted in zip(ours.weights, exact.weights, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-6)
    for found, wanted in zip(
        sum(ours.moments, ours.norms), sum(exact.moments, exact.norms), strict=True
    ):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)


SHAPES = [(37, 21), (37, 21), (17, 133)]
RULES = [
    {},
    {"scaling": "tensor"},
    {"limiter": None, "scale": 3.0},
    {"compat": True},
    {"compat": True, "scaling": "tensor"},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_dense_equals_the_reference_in_float64(rule):
    weights = [noise(shape, i) for i, shape in enumerate(SHAPES)]
    sizes = [1.0, 0.01, 5.0]
    compare(
        weights,
        lambda t: [(noise(s, 10 * t + i) * sizes[t],) for i, s in enumerate(SHAPES)],
        rank=1 if rule.get("scaling") == "tensor" else 5,
        **rule,
    )


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_factored_equals_the_reference_in_float64(rule):
    weights = [noise(shape, i) for i, shape in enumerate(SHAPES)]
    tokens = [19, 1, 20]

    def factors(t: int) -> list[tuple[Tensor, Tensor]]:
        pairs = []
        for i, (m, n) in enumerate(SHAPES):
            pairs.append((noise((tokens[t], n), 10 * t + i), noise((tokens[t], m), 99 + t + i)))
        return pairs

    compare(weights, factors, rank=1 if rule.get("scaling") == "tensor" else 5, **rule)


@pytest.mark.parametrize("rank", [16, 128, 300])
def test_ranks_of_one_tile_of_quarters_and_of_more_than_a_tile(rank):
    """Also ranks above the smaller side, which the optimizer gives to AdamW."""
    shape = (40, 24)
    compare([noise(shape, 0)], lambda t: [(noise(shape, t),)], rank=rank, steps=2)
    compare(
        [noise(shape, 0)],
        lambda t: [(noise((9, 24), t), noise((9, 40), 50 + t))],
        rank=rank,
        steps=2,
    )


@pytest.mark.parametrize("compat", [False, True])
def test_adamw_equals_the_reference_in_float64(compat):
    shapes = [(7,), (300,), (9, 5), (3, 2, 4), (1,)]
    compare(
        [noise(s, i) for i, s in enumerate(shapes)],
        lambda t: [(noise(s, 10 * t + i),) for i, s in enumerate(shapes)],
        projected=False,
        compat=compat,
    )


def strided(tensor: Tensor, how: str) -> Tensor:
    """The same numbers in another layout."""
    if how == "transposed":
        return tensor.T.contiguous().T
    wide = torch.full((tensor.shape[0], tensor.shape[1] + 3), math.nan, device=DEVICE)
    place = wide.to(tensor.dtype)[:, 1:-2]
    return place.copy_(tensor)


@pytest.mark.parametrize("how", ["transposed", "shifted"])
def test_layouts_and_addresses_do_not_matter(how):
    shape = (37, 21)
    start, grads = noise(shape, 0), [noise(shape, t) for t in range(1, 3)]
    x, dy = noise((5, 21), 8), noise((5, 37), 9)
    plain, other = Job([start.clone()], 4), Job([strided(start, how)], 4)
    for g in grads:
        plain.go(kernels, [(g,)])
        other.go(kernels, [(strided(g, how),)])
    plain.go(kernels, [(x, dy)])
    other.go(kernels, [(strided(x, how), strided(dy, how))])
    torch.testing.assert_close(other.weights[0], plain.weights[0], rtol=1e-6, atol=1e-6)
    flat = Job([strided(start, how)], 4, projected=False)
    same = Job([start.clone()], 4, projected=False)
    flat.go(kernels, [(strided(grads[0], how),)])
    same.go(kernels, [(grads[0],)])
    assert torch.equal(flat.weights[0], same.weights[0])


def close_to_rounding(found: Tensor, wanted: Tensor) -> None:
    """bfloat16 made by the same random numbers: equal, but where float32 errors cross a step."""
    differ = found != wanted
    assert differ.float().mean() < 0.002
    spacing = wanted.abs().float().clamp_min(1e-30).log2().floor().exp2() / 128
    assert ((found.float() - wanted.float()).abs() <= 1.01 * spacing).all()


@pytest.mark.parametrize("shape", [(150, 20), (20, 150), (70, 40)])
def test_bfloat16_takes_the_random_numbers_of_the_reference(shape):
    m, n = shape
    start = noise(shape, 0, torch.bfloat16)
    gradient = noise(shape, 1, torch.bfloat16)
    pair = (noise((6, n), 2, torch.bfloat16), noise((6, m), 3, torch.bfloat16))
    for given, projected in (((gradient,), True), (pair, True), ((gradient,), False)):
        jobs = [Job([start.clone()], 4, projected, limiter=None) for _ in range(2)]
        for job, module in zip(jobs, (kernels, reference), strict=True):
            job.go(module, [given])
        # Z is stored in bfloat16, so that scalings of factors are right to its precision alone.
        if len(given) == 2:
            a, b = (job.weights[0].float() - start.float() for job in jobs)
            assert (a - b).abs().mean() < 0.02 * b.abs().mean()
        else:
            close_to_rounding(jobs[0].weights[0], jobs[1].weights[0])


def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a small tile as for a large one."""
    for name in ("project", "shrink", "project_factored", "norm_factored", "move_factored"):
        tile = {key: 64 if size in (16, 32) else size for key, size in SMALL[name].items()}
        monkeypatch.setitem(kernels.TILES, name, tile)


@pytest.mark.parametrize(
    ("shape", "tokens"), [((272, 144), 0), ((144, 272), 0), ((272, 144), 130), ((144, 272), 70)]
)
def test_bfloat16_of_regular_shapes_has_the_moments_and_norms_of_float64(
    shape, tokens, monkeypatch
):
    """Hopper GPUs have kernels of their own for these; `tokens` 0 stands for gradients in memory."""
    large_tiles(monkeypatch)
    m, n = shape
    starts = [noise(shape, i, torch.bfloat16) for i in range(2)]
    jobs = [Job([w.clone() for w in starts], 128), Job([w.double() for w in starts], 128)]
    sizes = [(tokens, n), (tokens, m)] if tokens else [shape]
    given = [
        tuple(noise(size, 9 * i + k, torch.bfloat16) for k, size in enumerate(sizes, 5))
        for i in range(2)
    ]
    jobs[0].go(kernels, given)
    jobs[1].go(reference, [tuple(t.double() for t in each) for each in given])
    # Z is stored in bfloat16 for factors; weights differ by their rounding.
    limit = 1e-2 if tokens else 1e-4
    for found, wanted in zip(
        sum(jobs[0].moments, jobs[0].norms), sum(jobs[1].moments, jobs[1].norms), strict=True
    ):
        assert (found.double() - wanted).norm() < limit * wanted.norm()
    for found, wanted, start in zip(jobs[0].weights, jobs[1].weights, starts, strict=True):
        assert (found.double() - wanted).norm() < 0.5 * (wanted - start.double()).norm()


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(
    ("shape", "tokens"), [((256, 192), 64), ((128, 320), 21), ((384, 128), 100), ((128, 256), 256)]
)
def test_even_shapes_move_in_strips_as_others_do(shape, tokens, rule, monkeypatch):
    large_tiles(monkeypatch)
    m, n = shape
    strip = {"COLUMNS": 64, "SPAN": 2, "STAGES": 2, "num_warps": 4}
    monkeypatch.setattr(kernels, "STRIPS", {64: strip, 128: strip, 256: strip})
    start = noise(shape, 0, torch.bfloat16)
    pair = (noise((tokens, n), 2, torch.bfloat16), noise((tokens, m), 3, torch.bfloat16))
    strips, plain = (Job([start.clone()], 16, **rule) for _ in range(2))
    launched = watched(monkeypatch)
    strips.go(kernels, [pair])
    assert launched == ["strips"]
    monkeypatch.setattr(kernels, "_roomy", lambda device: False)
    plain.go(kernels, [pair])
    assert launched == ["strips"]
    close_to_rounding(strips.weights[0], plain.weights[0])
    assert (strips.weights[0] != start).any()


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A note of each launch of `move_strips`."""
    launched: list[str] = []
    kernel = kernels.EVEN.move_strips

    class Watched:
        def __getitem__(self, grid):
            launched.append("strips")
            return kernel[grid]

    monkeypatch.setattr(kernels, "EVEN", SimpleNamespace(move_strips=Watched()))
    return launched


def test_rounding_is_right_on_average_and_reproducible():
    shape = (128, 40)
    start = torch.full(shape, 1.0, dtype=torch.bfloat16, device=DEVICE)
    gradient = torch.ones(shape, dtype=torch.bfloat16, device=DEVICE)
    moved = []
    for _ in range(2):
        job = Job([start.clone()], 4, limiter=None, scale=0.05)
        exact = Job([start.double()], 4, limiter=None, scale=0.05)
        for _ in range(4):
            job.go(kernels, [(gradient,)])
            exact.go(reference, [(gradient.double(),)])
        moved.append(job.weights[0])
    assert torch.equal(*moved)
    wanted = (exact.weights[0] - 1).mean().item()
    found = moved[0].double() - 1
    # Up to four roundings to steps of 1/256, each with a variance of at most a quarter step^2.
    error = math.sqrt(4 / 4) / 256 / math.sqrt(found.numel())
    assert found.mean().item() == pytest.approx(wanted, abs=5 * error)
    assert found[:64].mean().item() == pytest.approx(wanted, abs=8 * error)


def test_special_values_stay_what_they_are():
    shape = (70, 20)
    start = noise(shape, 0, torch.bfloat16)
    start[0, 0], start[1, 1], start[69, 2] = math.nan, math.inf, -math.inf
    job = Job([start.clone()], 4, limiter=None)
    job.go(kernels, [(noise(shape, 1, torch.bfloat16),)])
    moved = job.weights[0]
    assert moved[0, 0].isnan() and moved[1, 1] == math.inf and moved[69, 2] == -math.inf
    assert moved.isfinite().sum() == moved.numel() - 3


def test_no_tokens_move_nothing_but_the_decay():
    start = noise((24, 20), 0)
    job = Job([start.clone()], 4)
    job.go(kernels, [(noise((0, 20), 0), noise((0, 24), 0))])
    torch.testing.assert_close(job.weights[0], start * (1 - 1e-3))


def test_a_recorded_table_outlives_those_that_come_later(monkeypatch):
    monkeypatch.setattr(apollo_buckets, "MOST_TABLES", 2)
    monkeypatch.setattr(apollo_buckets, "_tables", OrderedDict())
    monkeypatch.setattr(apollo_buckets, "_recorded", {})
    monkeypatch.setattr(apollo_buckets, "_recording", lambda device: True)
    recorded = apollo_buckets.numbers_on((1, 2, 3), DEVICE)
    monkeypatch.setattr(apollo_buckets, "_recording", lambda device: False)
    other = weakref.ref(apollo_buckets.numbers_on((4, 5, 6), DEVICE))
    for number in range(4):
        apollo_buckets.numbers_on((number,), DEVICE)
    assert other() is None
    assert apollo_buckets.numbers_on((1, 2, 3), DEVICE) is recorded
