"""TIES out of core against TIES in memory, bit for bit, over every option and odd shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests_support.merges import Merges, State

from vectors.errors import InputError, ShapeMismatch
from vectors.tasks import delta, merge, parts, streams
from vectors.tasks.histograms import Histogram, read_histograms, write_histograms
from vectors.tasks.memo import FolderMemo
from vectors.tasks.merge import apply
from vectors.tasks.stack import stacked

WEIGHTS = {"a": 1.0, "b": -0.5, "c": 0.7}
FLOATS = {"wide": torch.bfloat16, "long": torch.bfloat16, "fp32": torch.float32}
FLOATS |= {"half": torch.float16, "one": torch.bfloat16}


def base_state() -> State:
    rng = torch.Generator().manual_seed(0)
    shapes = {"wide": (33, 65), "long": (9001,), "fp32": (40, 11), "half": (301,), "one": ()}
    state = {n: 0.02 * torch.randn(s, generator=rng).to(FLOATS[n]) for n, s in shapes.items()}
    state["wide"][0, :4] = torch.tensor([0.0, -0.0, float("inf"), float("nan")])
    return {**state, "steps": torch.arange(5), "empty": torch.empty(0, 3, dtype=torch.bfloat16)}


def tuned_state(base: State, seed: int) -> State:
    rng = torch.Generator().manual_seed(seed)
    state = {name: tensor.clone() for name, tensor in base.items()}
    for name, dtype in FLOATS.items():
        noise = 0.002 * torch.randn(base[name].shape, generator=rng)
        # Coarse in one tensor, so that equal magnitudes and sums of zero are common.
        noise = noise.sign() * 0.001 if name == "long" else noise
        state[name] = (base[name].float() + noise).to(dtype)
    state["wide"][0, 2:4] = base["wide"][0, 2:4]
    return state


class Setup(Merges):
    """A base, three fine-tunes, and what merging them in memory gives."""

    def __init__(self, folder: Path) -> None:
        base = base_state()
        super().__init__(
            folder, base, {k: tuned_state(base, i + 1) for i, k in enumerate(WEIGHTS)}, WEIGHTS
        )

    def expected(self, keys: str, **options: Any) -> State:
        deltas = {
            k: {n: delta(self.base[n], self.tuned[k][n]) for n in (*FLOATS, "empty")} for k in keys
        }
        merged = merge("ties", {k: (WEIGHTS[k], deltas[k]) for k in keys}, options)
        out = dict(self.base)
        for name, x in merged.items():
            stack = stacked(name, {k: deltas[k][name] for k in keys}, WEIGHTS)
            only = self.tuned[keys][name] if len(keys) == 1 else None
            out[name] = apply(self.base[name], only, stack, x)
        return out


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.reshape(-1).view(torch.uint8).tolist() if tensor.numel() else []


def check(found: State, expected: State) -> None:
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert bits(found[name].reshape(-1)) == bits(tensor.reshape(-1)), name


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    monkeypatch.setattr(parts, "PART", 1000)  # several parts a tensor, and a last one that is short
    monkeypatch.setattr(streams, "PART", 1000)
    monkeypatch.setattr(parts, "SPAN", 3000)
    return Setup(tmp_path)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"density": 1.0},
    {"density": 0.001},
    {"density": 0.5, "rank": "share-plus-one", "zero_sum": "majority"},
    {"scope": "tensor"},
    {"scope": "tensor", "zero_sum": "majority", "density": 0.7},
    {"election": "unweighted", "divisor": "weights", "density": 0.6},
    {"vote": "count", "zero_sum": "positive", "density": 0.9},
    {"vote": "count", "divisor": "terms", "election": "unweighted", "density": 0.9},
    {"combine": "max", "scale": -0.3, "density": 0.8},
    {"divisor": "none", "scale": 1.7},
    {"divisor": "signed-weights", "density": 0.4},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_has_the_bits_of_the_plain_way(setup: Setup, options: dict) -> None:
    check(setup.write("abc", **options), setup.expected("abc", **options))


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_one_term_comes_out_as_it_went_in(setup: Setup, density: float) -> None:
    found = setup.write("a", density=density)
    check(found, setup.expected("a", density=density))
    if density == 1.0:
        check(found, setup.tuned["a"])


def test_magnitudes_that_were_kept_are_not_counted_again(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    memo = FolderMemo(setup.folder)
    setup.write("abc", memo)
    setup.write("ab", memo, scope="tensor")
    counted: list[int] = []
    plain = streams.Ties.count
    monkeypatch.setattr(
        streams.Ties, "count", lambda self, rows: counted.extend(rows) or plain(self, rows)
    )
    for options in ({"density": 0.37}, {"density": 0.9, "vote": "count"}):
        check(setup.write("abc", memo, **options), setup.expected("abc", **options))
    assert not counted
    tensor = {"scope": "tensor", "density": 0.6}
    check(setup.write("abc", memo, **tensor), setup.expected("abc", **tensor))
    assert counted == [2]
    (setup.folder / "a.global.safetensors").write_bytes(b"damaged")
    check(setup.write("abc", memo), setup.expected("abc"))
    assert counted == [2, 0]


def test_too_many_loose_magnitudes_are_looked_at_again(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MOST_LOOSE", 10)
    for options in ({"density": 0.37}, {"density": 0.6, "scope": "tensor"}):
        memo = FolderMemo(setup.folder)
        for _ in range(2):
            check(setup.write("abc", memo, **options), setup.expected("abc", **options))


def test_tables_are_emptied_before_they_overflow(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "TABLE_ROOM", 9001)
    for options in ({"density": 0.37}, {"density": 0.6, "scope": "tensor"}):
        check(setup.write("abc", **options), setup.expected("abc", **options))


def test_values_that_are_not_finite_are_refused(setup: Setup) -> None:
    for name in ("long", "fp32"):
        state = {**setup.tuned["b"], name: setup.tuned["b"][name].clone()}
        state[name].view(-1)[7] = float("inf")
        save_file(state, setup.folder / "b" / "model.safetensors")
        with pytest.raises(InputError, match=f"moves '{name}' by values that are not finite"):
            setup.write("abc")


def test_folders_that_do_not_fit_are_refused(setup: Setup) -> None:
    state = setup.tuned["a"]
    for wrong, words in (
        ({**state, "steps": state["steps"] + 1}, "integers cannot be merged"),
        ({**state, "extra": torch.ones(1)}, "'extra' that the base lacks"),
        ({**state, "half": state["half"].float()}, r"'half' as F16 \[301\]"),
        ({n: t for n, t in state.items() if n != "one"}, "lacks it"),
    ):
        save_file(wrong, setup.folder / "a" / "model.safetensors")
        with pytest.raises(ShapeMismatch, match=words):
            setup.write("abc")


@pytest.mark.parametrize("loose", [True, False])
def test_histograms_know_every_rank(loose: bool) -> None:
    rng = np.random.default_rng(0)
    sizes = np.abs(rng.standard_normal(3000).astype(np.float32) * 0.01)
    sizes[:2000] = sizes[:2000].view(np.uint32).__and__(0xFFFFF000).view(np.float32)
    patterns = sizes.view(np.uint32)
    counts = np.bincount(patterns >> 12, minlength=1 << 19)
    histogram = Histogram.of(counts, [patterns[patterns & 0xFFF != 0]] if loose else None)
    histogram = read_histograms(write_histograms({"t": histogram}))["t"]
    assert histogram.size == 3000
    for rank, pattern in enumerate(np.sort(patterns)[::-1], 1):
        number, within = histogram.find(rank)
        assert number == pattern >> 12
        assert histogram.pick(number, within) == (pattern if loose else None)
