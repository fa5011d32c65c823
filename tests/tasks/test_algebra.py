"""What holds of every merge method, whatever the numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vectors.tasks import METHODS, merge

Terms = dict[str, tuple[float, dict[str, torch.Tensor]]]

# Few values, so that equal magnitudes, zeros and sums of zero are common.
VALUES = st.sampled_from([0.0, 0.25, -0.25, 0.5, -0.5, 1.0, -1.0, 0.3, -0.7])
WEIGHTS = st.sampled_from([1.0, -1.0, 0.5, -0.5, 2.0])
QUICK = settings(max_examples=25, deadline=None)


@st.composite
def terms(draw: st.DrawFn, least: int = 2) -> Terms:
    shape = draw(st.sampled_from([(3, 4), (5,), (2, 7)]))
    size = int(np.prod(shape))
    return {
        key: (
            draw(WEIGHTS),
            {
                name: torch.tensor(draw(st.lists(VALUES, min_size=size, max_size=size))).reshape(
                    shape
                )
                for name in ("one", "two")
            },
        )
        for key in "abcd"[: draw(st.integers(least, 4))]
    }


ELECTIONS = st.fixed_dictionaries(
    {},
    optional={
        "election": st.sampled_from(["weighted", "unweighted"]),
        "vote": st.sampled_from(["sum", "count"]),
        "divisor": st.sampled_from(["count", "weights", "terms", "none"]),
        "combine": st.sampled_from(["sum", "max"]),
        "zero_sum": st.sampled_from(["none", "majority"]),
        "scale": st.sampled_from([1.0, 0.4, -2.0]),
    },
)
TIES = st.builds(
    lambda a, b: {**a, **b},
    ELECTIONS,
    st.fixed_dictionaries(
        {"density": st.sampled_from([0.1, 0.5, 0.9, 1.0])},
        optional={
            "scope": st.sampled_from(["global", "tensor"]),
            "rank": st.sampled_from(["share", "share-plus-one"]),
        },
    ),
)


def equal(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> bool:
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def negated(given_terms: Terms) -> Terms:
    """The same weights on the opposite vectors."""
    return {
        key: (weight, {name: -x for name, x in deltas.items()})
        for key, (weight, deltas) in given_terms.items()
    }


def opposite(merged: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: -x for name, x in merged.items()}


@pytest.mark.parametrize("method", METHODS)
@QUICK
@given(data=st.data())
def test_order_does_not_matter(method: str, data: st.DataObject) -> None:
    one = data.draw(terms())
    other = {key: one[key] for key in data.draw(st.permutations(list(one)))}
    other = {key: (w, dict(reversed(d.items()))) for key, (w, d) in other.items()}
    assert equal(merge(method, one), merge(method, other))


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"tsv-m", "iso-c"}))
@QUICK
@given(one=terms())
def test_negating_the_vectors_or_the_weights_negates_the_result(method: str, one: Terms) -> None:
    merged = merge(method, one)
    assert equal(merge(method, negated(one)), opposite(merged))
    assert equal(merge(method, {k: (-w, d) for k, (w, d) in one.items()}), opposite(merged))


@pytest.mark.parametrize("method", ["tsv-m", "iso-c"])
@QUICK
@given(seed=st.integers(0, 1000))
def test_negation_of_spectra(method: str, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    one = {
        key: (w, {"t": torch.randn(6, 4, generator=rng)}) for key, w in (("a", 1.0), ("b", -2.0))
    }
    torch.testing.assert_close(
        merge(method, negated(one))["t"], -merge(method, one)["t"], atol=1e-5, rtol=1e-4
    )


@QUICK
@given(one=terms(), options=TIES)
def test_negation_under_every_option_of_ties(one: Terms, options: dict[str, Any]) -> None:
    merged = merge("ties", one, options)
    assert equal(merge("ties", negated(one), options), opposite(merged))
    flipped = {key: (-w, d) for key, (w, d) in one.items()}
    assert equal(merge("ties", flipped, options), opposite(merged))


@pytest.mark.parametrize("method", METHODS)
@QUICK
@given(one=terms(least=3))
def test_a_removed_term_was_never_there(method: str, one: Terms) -> None:
    gone = min(one)
    rest = {key: term for key, term in one.items() if key != gone}
    assert equal(merge(method, {**one, gone: (0.0, one[gone][1])}), merge(method, rest))


@pytest.mark.parametrize("method", METHODS)
@QUICK
@given(one=terms())
def test_a_tensor_left_out_is_one_left_alone(method: str, one: Terms) -> None:
    first = min(one)
    weight, deltas = one[first]
    blank = {**deltas, "two": torch.zeros_like(deltas["two"])}
    without = {"one": deltas["one"]}
    assert equal(
        merge(method, {**one, first: (weight, blank)}),
        merge(method, {**one, first: (weight, without)}),
    )


@QUICK
@given(one=terms(least=1), scope=st.sampled_from(["global", "tensor"]))
def test_ties_of_one_vector_at_density_one_is_the_vector(one: Terms, scope: str) -> None:
    deltas = one["a"][1]
    assert equal(merge("ties", {"a": (1.0, deltas)}, {"density": 1, "scope": scope}), deltas)
    assert equal(merge("dare", {"a": (1.0, deltas)}, {"density": 1}), deltas)
    assert equal(merge("della", {"a": (1.0, deltas)}, {"density": 1, "epsilon": 0}), deltas)
    assert equal(merge("breadcrumbs", {"a": (1.0, deltas)}, {"density": 1, "gamma": 0}), deltas)


@QUICK
@given(one=terms(), options=TIES)
def test_ties_lies_between_its_terms(one: Terms, options: dict[str, Any]) -> None:
    merged = merge("ties", one, {**options, "divisor": "count", "scale": 1.0})
    for name, found in merged.items():
        values = torch.stack([w * d[name] for w, d in one.values()] + [torch.zeros(found.shape)])
        assert bool((found <= values.amax(0) + 1e-6).all())
        assert bool((found >= values.amin(0) - 1e-6).all())


@QUICK
@given(one=terms())
def test_what_no_term_moves_stays(one: Terms) -> None:
    for _, deltas in one.values():
        deltas["one"].view(-1)[0] = 0.0
    for method in sorted(METHODS.keys() - {"tsv-m", "iso-c"}):
        assert merge(method, one)["one"].view(-1)[0] == 0, method
