"""Reference: diagnostics against brute force, scikit-learn, and cases known by heart."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from vectors.steering.diagnostics import (
    Separation,
    agreement,
    auroc,
    cohens_d,
    pair_accuracy,
    separation,
    steerable,
)
from vectors.steering.statistics import bootstrap_mean, permutation_p, repetition, table_kl

scores = st.lists(st.integers(-5, 5).map(float), min_size=2, max_size=12)


@given(scores, scores)
@settings(deadline=None)
def test_auroc_is_scikit_learns(pos, neg):
    expected = roc_auc_score([1] * len(pos) + [0] * len(neg), pos + neg)
    assert auroc(torch.tensor(pos), torch.tensor(neg)) == pytest.approx(expected)


def test_agreement_is_the_mean_cosine_over_pairs():
    diffs = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    cosines = [
        float(torch.nn.functional.cosine_similarity(diffs[i], diffs[j], dim=0))
        for i in range(7)
        for j in range(i)
    ]
    assert agreement(diffs) == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)
    assert agreement(torch.ones(4, 3)) == pytest.approx(1)


def test_cohens_d_and_pair_accuracy_by_hand():
    pos, neg = torch.tensor([2.0, 4.0]), torch.tensor([1.0, 5.0])
    assert cohens_d(pos, neg) == pytest.approx(0.0)
    assert cohens_d(pos + 3, neg) == pytest.approx(3 / math.sqrt((2 + 8) / 2))
    assert pair_accuracy(pos, neg) == 0.5
    assert pair_accuracy(pos, pos) == 0.5


def test_separation_of_a_planted_direction():
    v = torch.tensor([1.0, 0.0])
    pos, neg = torch.tensor([[1.0, 0.0], [2.0, 1.0]]), torch.tensor([[0.0, 5.0], [-1.0, 0.0]])
    found = separation(v, pos, neg)
    assert found.auroc == 1 and found.pair_accuracy == 1


@pytest.mark.parametrize(
    ("pair", "auc", "pairs", "expected"),
    [
        (1.0, 0.96, 25, "yes"),
        (0.72, 0.66, 25, "marginal"),
        (0.56, 0.55, 25, "no"),
        (1.0, 1.0, 3, "no"),
        (0.0, 0.1, 25, "no"),
    ],
)
def test_who_is_steerable(pair, auc, pairs, expected):
    assert steerable(Separation(auc, 1.0, pair, 0.1), pairs) == expected


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(200):
        x = torch.randn(25, generator=generator).tolist()
        _, low, high = bootstrap_mean(x, draws=500, seed=trial)
        covered += low <= 0 <= high
    assert 0.86 <= covered / 200 <= 0.98


def test_permutation_p_needs_nineteen_controls_for_five_percent():
    assert permutation_p(1.0, [0.0] * 19) == pytest.approx(0.05)
    assert permutation_p(1.0, [0.0] * 18) > 0.05
    assert permutation_p(1.0, [2.0] + [0.0] * 18) == pytest.approx(0.1)


def test_table_kl_is_exact_on_whole_tables_and_a_lower_bound_on_parts():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        p, q = (torch.randn(50, generator=generator).mul(3).log_softmax(0) for _ in range(2))
        exact = float((p.exp() * (p - q)).sum())
        whole = [dict(enumerate(x.tolist())) for x in (p, q)]
        assert table_kl(*whole) == pytest.approx(exact, rel=1e-4)
        parts = [{int(i): float(x[i]) for i in x.topk(20).indices} for x in (p, q)]
        assert -1e-9 <= table_kl(*parts) <= exact + 1e-6
    assert table_kl(whole[0], whole[0]) == pytest.approx(0, abs=1e-6)


def test_repetition():
    assert repetition("a b c d e f") == 0
    assert repetition("go go go go go go") == pytest.approx(0.75)
    assert repetition("") == 0
