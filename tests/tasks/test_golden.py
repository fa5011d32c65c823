"""What published codes compute on the same numbers, and by which option each is had.

Every test that says `differs` is a place where the default departs from a published code.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vectors.errors import InputError
from vectors.tasks import merge

ROWS = (
    (0.9, -0.8, 0.1, 0.4, -0.2, 0.05, 0.6, -0.3, 0.01, 0.7),
    (-0.5, 0.2, 0.3, 0.4, 0.8, -0.05, -0.6, 0.3, -0.02, 0.1),
    (0.2, -0.1, -0.9, 0.3, -0.7, 0.5, -0.1, 0.4, 0.03, -0.6),
)
AUTHORS = {"rank": "share-plus-one", "zero_sum": "majority"}
MERGEKIT = {"scope": "tensor", "zero_sum": "positive", "divisor": "signed-weights"}
PEFT = {"scope": "tensor", "zero_sum": "positive", "election": "unweighted"}


def ties(
    rows: tuple[tuple[float, ...], ...], weights: tuple[float, ...] = (), **options: Any
) -> torch.Tensor:
    weights = weights or (1.0,) * len(rows)
    pairs = zip(weights, rows, strict=True)
    terms = {str(i): (w, {"t": torch.tensor(r)}) for i, (w, r) in enumerate(pairs)}
    return merge("ties", terms, options)["t"]


def same(found: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected).float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("density", "expected"),
    [
        (0.2, [0.9, -0.8, -0.9, 0, 0.8, 0, -0.6, 0, 0, 0.7]),
        (0.4, [0.9, -0.8, -0.9, 0.4, 0.8, 0.5, 0.6, 0.35, 0, 0.7]),
        (0.5, [0.9, -0.8, -0.9, 1.1 / 3, 0.8, 0.5, 0.6, 0.35, 0, 0.7]),
        (0.8, [0.55, -0.45, -0.9, 1.1 / 3, -0.45, 0.275, -0.35, 0.35, 0, 0.4]),
    ],
)
def test_the_authors_mean(density: float, expected: list[float]) -> None:
    same(ties(ROWS, density=density, **AUTHORS), expected)


def test_the_authors_sum_and_maximum() -> None:
    added = ties(ROWS, density=0.4, divisor="none", **AUTHORS)
    same(added, [0.9, -0.8, -0.9, 0.8, 0.8, 0.5, 0.6, 0.7, 0, 0.7])
    largest = ties(ROWS, density=0.8, combine="max", **AUTHORS)
    same(largest, [0.9, -0.8, -0.9, 0.4, -0.7, 0.5, -0.6, 0.4, 0, 0.7])


@pytest.mark.parametrize("options", [MERGEKIT, PEFT], ids=["mergekit", "peft"])
@pytest.mark.parametrize(
    ("density", "expected"),
    [
        (0.2, [0.9, -0.8, -0.9, 0, 0.8, 0, -0.6, 0, 0, 0]),
        (0.4, [0.9, -0.8, -0.9, 0.4, 0.8, 0.5, 0.6, 0, 0, 0.7]),
    ],
)
def test_mergekit_and_peft(options: dict[str, Any], density: float, expected: list[float]) -> None:
    same(ties(ROWS, density=density, **options), expected)


# Columns 7 at 0.5, and 1 and 6 at 0.8, hang on which of two equal magnitudes a sort puts first.
MERGEKIT_50 = [0.9, -0.8, -0.9, 0.4, 0.8, 0.5, 0.6, 0.4, 0, 0.7]
PEFT_50 = [0.9, -0.8, -0.9, 0.4, 0.8, 0.5, 0.6, 0.35, 0, 0.7]
MERGEKIT_80 = [0.55, -0.45, -0.9, 1.1 / 3, -0.45, 0.5, 0.6, 0.35, 0, 0.4]
PEFT_80 = [0.55, -0.8, -0.9, 1.1 / 3, -0.45, 0.5, -0.35, 0.35, 0, 0.4]


@pytest.mark.parametrize(
    ("density", "published", "columns"),
    [
        (0.5, MERGEKIT_50, {7: 0.35}),
        (0.5, PEFT_50, {}),
        (0.8, MERGEKIT_80, {6: -0.35}),
        (0.8, PEFT_80, {1: -0.45}),
    ],
    ids=["mergekit-50", "peft-50", "mergekit-80", "peft-80"],
)
def test_equal_magnitudes_are_all_kept_which_differs(
    density: float, published: list[float], columns: dict[int, float]
) -> None:
    expected = [columns.get(i, x) for i, x in enumerate(published)]
    same(ties(ROWS, density=density, **MERGEKIT), expected)
    same(ties(ROWS, density=density, **PEFT), expected)


def test_a_row_of_equals_is_kept_whole() -> None:
    same(ties(((0.5, -0.5, 0.5, 0.5),), density=0.25), [0.5, -0.5, 0.5, 0.5])


def test_density_one_keeps_all_where_the_authors_code_stops_which_differs() -> None:
    same(ties(ROWS[:1], density=1.0, **AUTHORS), list(ROWS[0]))
    same(ties(ROWS[:1], density=1.0), list(ROWS[0]))


def test_a_tiny_density_keeps_one_where_peft_keeps_none_which_differs() -> None:
    same(ties(((0.1, -0.3, 0.2),), density=0.01), [0, -0.3, 0])


def test_densities_are_shares_and_not_percentages_which_differs() -> None:
    with pytest.raises(InputError, match="option density of 'ties' cannot be '20'"):
        ties(ROWS, density=20)


def test_a_share_is_of_the_number_as_written() -> None:
    row = tuple(float(i + 1) for i in range(100))
    assert int(0.29 * 100) == 28
    assert ties((row,), density=0.29).count_nonzero() == 29


def test_scope_decides_where_changes_survive() -> None:
    rng = torch.Generator().manual_seed(0)
    deltas = {
        "small": 1e-3 * torch.randn(4000, generator=rng),
        "large": 1e-2 * torch.randn(1000, generator=rng),
    }
    kept = {
        scope: merge("ties", {"a": (1.0, deltas)}, {"scope": scope})
        for scope in ("global", "tensor")
    }
    assert kept["tensor"]["small"].count_nonzero() == 800
    assert kept["tensor"]["large"].count_nonzero() == 200
    assert kept["global"]["small"].count_nonzero() < 250
    assert sum(int(x.count_nonzero()) for x in kept["global"].values()) == 1000


DELTAS = ((1.0, 1.0), (1.0, -2.0))
WEIGHTS = (1.0, -0.5)


def test_negative_weights_by_each_published_rule() -> None:
    same(ties(DELTAS, WEIGHTS, density=1.0, divisor="signed-weights"), [1, 4])
    same(ties(DELTAS, WEIGHTS, density=1.0, divisor="none"), [1, 2])
    same(ties(DELTAS, WEIGHTS, density=1.0, election="unweighted"), [0.25, 1.0])


def test_negation_negates_where_mergekit_adds_which_differs() -> None:
    same(ties(((1.0,),), (-0.5,), divisor="signed-weights"), [1.0])
    same(ties(((1.0,),), (-0.5,)), [-0.5])
    same(ties(((1.0,),), (-0.5,), divisor="weights"), [-1.0])


def test_weights_scale_as_in_peft_where_mergekit_divides_them_out_which_differs() -> None:
    rows = ((1.0, -1.0),) * 3
    same(ties(rows, (2.0,) * 3, density=1.0), [2, -2])
    same(ties(rows, (2.0,) * 3, density=1.0, divisor="weights"), [1, -1])


@pytest.mark.parametrize(("zero_sum", "first"), [("majority", -1), ("positive", 1), ("none", 0)])
def test_a_zero_sum_elects_nothing_which_differs(zero_sum: str, first: float) -> None:
    rows = ((1.0, -2.0, -3.0), (-1.0, -2.0, -3.0))
    same(ties(rows, density=1.0, zero_sum=zero_sum), [first, -2, -3])


def test_dare_rescales_exactly_where_mergekit_rescales_by_norms_which_differs() -> None:
    delta = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    merged = merge("dare", {"a": (1.0, {"t": delta})}, {"density": 0.1})["t"]
    kept = merged != 0
    assert 60 < int(kept.sum()) < 140
    torch.testing.assert_close(merged[kept], delta[kept] * 10, rtol=1e-6, atol=0)


def test_della_rescales_each_element_where_mergekit_takes_one_factor_which_differs() -> None:
    delta = torch.arange(1.0, 1001.0)
    options = {"density": 0.5, "epsilon": 0.2}
    merged = merge("della", {"a": (1.0, {"t": delta})}, options)["t"]
    kept = merged.nonzero().flatten()
    chance = 0.3 + 0.4 * kept.double() / 999
    torch.testing.assert_close(merged[kept].double(), delta[kept] / chance, rtol=1e-6, atol=0)
    assert 400 < len(kept) < 600
    assert (kept >= 500).sum() > (kept < 500).sum()
