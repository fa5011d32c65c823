"""Merging on a device against the processor's way, bit for bit; without CUDA, interpreted."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests_support.merges import Merges, State

from vectors.errors import InputError, ShapeMismatch
from vectors.store import Library, base_digest
from vectors.tasks import Recipe, delta, materialise
from vectors.tasks.memo import FolderMemo
from vectors.tasks.methods.ties import TiesParameters
from vectors.tasks.recipes import Operation
from vectors.tasks.sources import FolderTerm
from vectors.tasks.weights import write_weights

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
if find_spec("triton") is None:
    pytest.skip("Triton is not installed on this machine", allow_module_level=True)
from workbench.merging import crossing, linear, ties  # noqa: E402  # which way kernels run is decided here

DEVICE = torch.device("cuda" if CUDA else "cpu")
WEIGHTS = {"a": 1.0, "b": -0.5, "c": 0.7}
SHAPES = {"wide": (33, 35), "long": (3001,), "one": (), "norm": (301,)}


def base_state() -> State:
    rng = torch.Generator().manual_seed(0)
    state = {n: (0.02 * torch.randn(s, generator=rng)).bfloat16() for n, s in SHAPES.items()}
    state["wide"][0, :4] = torch.tensor([0.0, -0.0, float("inf"), float("nan")])
    return {**state, "steps": torch.arange(5), "empty": torch.empty(0, 3, dtype=torch.bfloat16)}


def tuned_state(base: State, seed: int) -> State:
    rng = torch.Generator().manual_seed(seed)
    state = {name: tensor.clone() for name, tensor in base.items()}
    for name, shape in SHAPES.items():
        noise = 0.002 * torch.randn(shape, generator=rng)
        # Coarse in one tensor, so that equal magnitudes and sums of zero are common.
        noise = noise.sign() * 0.001 if name == "long" else noise
        state[name] = (base[name].float() + noise).bfloat16()
    state["wide"][0, 2:4] = base["wide"][0, 2:4]
    return state


class FloatsAlone(FolderTerm):
    """A fine-tune that leaves integers alone, which no sum can have."""

    def changes(self, name: str) -> bool:
        return name in SHAPES


class Setup(Merges):
    """A base and three fine-tunes, merged both ways."""

    def __init__(self, folder: Path) -> None:
        base = base_state()
        super().__init__(
            folder, base, {k: tuned_state(base, i + 1) for i, k in enumerate(WEIGHTS)}, WEIGHTS
        )

    def on_device(
        self, keys: str, held: crossing.Held, memo: FolderMemo | None = None, **options: Any
    ) -> State:
        out = self.new_folder()
        merge = ties.DeviceTies(
            self.checkpoint, self.terms(keys), [WEIGHTS[k] for k in keys],
            TiesParameters(**options), memo, DEVICE, held,
        )  # fmt: skip
        self.crossing = merge.crossing
        assert sorted(merge.write(out)) == sorted(self.base)
        return load_file(out / "model.safetensors")


def check(found: State, expected: State) -> None:
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        if tensor.numel():
            same = found[name].reshape(-1).view(torch.uint8) == tensor.reshape(-1).view(torch.uint8)
            assert same.all(), name


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    # Several parts a tensor, the last one short.
    monkeypatch.setattr(crossing, "RING", 1000)
    monkeypatch.setattr(crossing, "STAGE", 1 << 10)
    monkeypatch.setattr(ties.DeviceTies, "span", 2000)
    monkeypatch.setattr(ties.kernels, "COPIES", 2)
    return Setup(tmp_path)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"density": 1.0},
    {"density": 0.5, "rank": "share-plus-one", "zero_sum": "majority"},
    {"scope": "tensor"},
    {"scope": "tensor", "zero_sum": "majority", "density": 0.7},
    {"vote": "count", "zero_sum": "positive", "density": 0.9},
    {"combine": "max", "scale": -0.3, "density": 0.8},
    {"divisor": "signed-weights", "election": "unweighted", "density": 0.4},
]


HELD: list[crossing.Held] = ["all", "base", "none"]
CASES = [(options, HELD[number % 3]) for number, options in enumerate(OPTIONS)]


@pytest.mark.parametrize(("options", "held"), [*CASES, ({}, "base"), ({}, "none")], ids=str)
def test_every_option_has_the_bits_of_the_processor(
    setup: Setup, options: dict[str, Any], held: crossing.Held
) -> None:
    check(setup.on_device("abc", held, **options), setup.write("abc", **options))


@pytest.mark.parametrize("held", ["all", "none"])
def test_each_byte_crosses_once_where_all_is_held(setup: Setup, held: crossing.Held) -> None:
    elements = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    setup.on_device("abc", held)
    assert setup.crossing.crossed == 2 * elements * 4 * (1 if held == "all" else 2)
    # With the counts kept, one pass is all there is.
    memo = FolderMemo(setup.folder)
    setup.on_device("abc", held, memo)
    setup.on_device("abc", held, memo, density=0.4)
    assert setup.crossing.crossed == 2 * elements * 4


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_counts_are_kept_with_the_same_bytes(setup: Setup, scope: str) -> None:
    memos = [FolderMemo(setup.new_folder()) for _ in range(2)]
    setup.write("abc", memos[0], scope=scope)
    setup.on_device("abc", "all", memos[1], scope=scope)
    files = [sorted(folder._folder.iterdir()) for folder in memos]
    assert [file.name for file in files[0]] == [f"{key}.{scope}.safetensors" for key in "abc"]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


@pytest.mark.parametrize("options", [{"density": 0.37}, {"density": 0.6, "scope": "tensor"}])
def test_too_many_loose_magnitudes_are_looked_at_again(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    want = setup.write("abc", **options)
    monkeypatch.setattr(ties, "MOST_LOOSE", 3)
    looked: list[int] = []
    plain = ties.DeviceTies.look
    monkeypatch.setattr(
        ties.DeviceTies,
        "look",
        lambda self, unclear: looked.extend(unclear) or plain(self, unclear),
    )
    check(setup.on_device("abc", "base", **options), want)
    assert looked


def test_every_rank_of_a_bin_is_found(setup: Setup) -> None:
    """Bins of magnitudes with low bits, and of some without."""
    merge = ties.DeviceTies(
        setup.checkpoint, setup.terms("a"), [1.0], TiesParameters(), None, DEVICE, "all"
    )
    pairs = [(setup.base[name], setup.tuned["a"][name]) for name in SHAPES]
    sizes = torch.cat([delta(*pair).abs().reshape(-1) for pair in pairs]).view(torch.int32)
    sizes = sizes.sort(descending=True).values.numpy()
    numbers, loose = sizes >> 12, sizes & 0xFFF != 0
    mixed = set(numbers[loose]) & set(numbers[~loose])
    assert mixed
    for number in [*sorted(mixed)[:2], *sorted(set(numbers[loose]) - mixed)[:2]]:
        wanted = sizes[numbers == number].tolist()
        wanted = [*wanted[:5], wanted[-1]]
        ranks = [*range(1, len(wanted)), int((numbers == number).sum())]
        with merge.walk.reader:
            found = merge.look([(0, "", int(number), rank) for rank in ranks])
        assert found == wanted
        merge = ties.DeviceTies(
            setup.checkpoint, setup.terms("a"), [1.0], TiesParameters(), None, DEVICE, "all"
        )


def test_tables_are_emptied_before_they_overflow(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ties, "MOST_COUNTED", 3000)
    check(setup.on_device("abc", "all", density=0.37), setup.write("abc", density=0.37))


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_one_term_comes_out_as_it_went_in(setup: Setup, density: float) -> None:
    found = setup.on_device("a", "none", density=density)
    check(found, setup.write("a", density=density))
    if density == 1.0:
        check(found, setup.tuned["a"])


def test_values_that_are_not_finite_are_refused(setup: Setup) -> None:
    state = {**setup.tuned["b"], "norm": setup.tuned["b"]["norm"].clone()}
    state["norm"][7] = float("inf")
    save_file(state, setup.folder / "b" / "model.safetensors")
    for options in ({}, {"scope": "tensor"}):
        with pytest.raises(InputError, match="b moves 'norm' by values that are not finite"):
            setup.on_device("abc", "none", **options)
    save_file(
        {**setup.tuned["b"], "steps": torch.ones(5).long()}, setup.folder / "b/model.safetensors"
    )
    with pytest.raises(ShapeMismatch, match="integers cannot be merged"):
        setup.on_device("abc", "none")


@pytest.mark.parametrize("weights", [(1.0,), (0.3,), (1.0, -0.5, 0.7)], ids=str)
def test_the_weighted_sum_has_the_bits_of_the_processor(
    setup: Setup, weights: tuple[float, ...]
) -> None:
    keys, op = "abc"[: len(weights)], Operation.of("linear", {})
    terms = [FloatsAlone(k, setup.folder / k, setup.checkpoint) for k in keys]
    want, out = setup.new_folder(), setup.new_folder()
    list(write_weights(setup.checkpoint, terms, weights, op, want))
    names = list(linear.DeviceSum(setup.checkpoint, terms, weights, DEVICE).write(out))
    assert sorted(names) == sorted(setup.base)
    check(load_file(out / "model.safetensors"), load_file(want / "model.safetensors"))


@pytest.mark.parametrize("method", ["ties", "linear"])
@pytest.mark.parametrize("held", ["all", "none"])
def test_task_vectors_of_a_library_that_leave_tensors_alone(
    setup: Setup, method: str, held: crossing.Held
) -> None:
    base = setup.folder / "base"
    moved = {"a": ("wide", "long", "one"), "b": ("norm",), "c": ("long",)}
    libraries = [Library(setup.folder / name) for name in ("one", "other")]
    digest, terms = base_digest(base), []
    for library in libraries:
        entries = [
            library.save_task(k, digest, setup.checkpoint, {n: setup.tuned[k][n] for n in names})
            for k, names in moved.items()
        ]
        terms = [(e.digest, WEIGHTS[k]) for k, e in zip(moved, entries, strict=True)]
    made = Recipe(op=Operation.of(method, {}), base=digest, terms=tuple(terms))

    def write(
        checkpoint: Any, terms: Any, weights: Any, op: Operation, folder: Path, memo: Any = None
    ):
        if method == "linear":
            return linear.DeviceSum(checkpoint, terms, weights, DEVICE).write(folder)
        rule: Any = op.parameters
        return ties.DeviceTies(checkpoint, terms, weights, rule, memo, DEVICE, held).write(folder)

    want = materialise(libraries[0], made, base, setup.folder / "plain")
    found = materialise(libraries[1], made, base, setup.folder / "device", write=write)
    check(load_file(found / "model.safetensors"), load_file(want / "model.safetensors"))


def test_what_is_held_is_what_fits() -> None:
    elements, terms = 8 * 10**9, 3
    found = [crossing.held_in(free << 30, elements, terms, 16) for free in (70, 40, 20, 8)]
    assert found == ["all", "base", "base", "none"]
    assert crossing.held_in(50 << 30, elements, terms, 16, base=True) == "all"
    assert crossing.held_in(8 << 30, elements, terms, 16, base=True) == "base"
