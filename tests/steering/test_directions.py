"""Reference: directions against closed forms and scikit-learn's own definitions."""

from __future__ import annotations

import pytest
import torch

from vectors.errors import NotSteerable, ShapeMismatch
from vectors.steering.controls import random_direction, shuffled_difference
from vectors.steering.directions import METHODS, direction, mean_difference, pca
from vectors.types import Method

N, D = 40, 16


@pytest.fixture
def planted():
    """Pairs that differ along one known direction, in noise."""
    generator = torch.Generator().manual_seed(0)
    truth_D = random_direction(D, 3)
    common_ND = torch.randn(N, D, generator=generator) * 3
    noise = [torch.randn(N, D, generator=generator) * 0.2 for _ in range(2)]
    return truth_D, common_ND + noise[0] + truth_D, common_ND + noise[1] - truth_D


@pytest.mark.parametrize("method", list(Method))
def test_every_method_finds_the_planted_direction(planted, method):
    truth_D, pos_ND, neg_ND = planted
    found_D = direction(method, pos_ND, neg_ND)
    assert float(found_D.norm()) == pytest.approx(1, abs=1e-6)
    floor = 0.9 if method is not Method.LOGISTIC else 0.5
    assert float(found_D @ truth_D) > floor


@pytest.mark.parametrize("method", list(Method))
def test_swapping_the_sides_turns_the_direction_round(planted, method):
    _, pos_ND, neg_ND = planted
    there, back = direction(method, pos_ND, neg_ND), direction(method, neg_ND, pos_ND)
    assert float(there @ back) == pytest.approx(-1, abs=1e-3)


def test_mean_difference_is_the_mean_of_the_differences(planted):
    _, pos_ND, neg_ND = planted
    loop_D = sum((p - n for p, n in zip(pos_ND, neg_ND, strict=True)), torch.zeros(D)) / N
    torch.testing.assert_close(mean_difference(pos_ND, neg_ND), loop_D)


def test_pca_is_the_top_eigenvector_of_the_second_moment(planted):
    _, pos_ND, neg_ND = planted
    diffs = (pos_ND - neg_ND).double()
    _, vectors = torch.linalg.eigh(diffs.T @ diffs)
    cosine = float(pca(pos_ND, neg_ND).double() @ vectors[:, -1])
    assert abs(cosine) == pytest.approx(1, abs=1e-6)


def test_logistic_lies_in_the_stream_and_not_in_the_fit(planted):
    # A feature of huge scale would dominate if the weights were not divided by the deviations.
    _, pos_ND, neg_ND = planted
    scale = torch.ones(D)
    scale[0] = 1000.0
    plain = METHODS[Method.LOGISTIC].function(pos_ND, neg_ND)
    scaled = METHODS[Method.LOGISTIC].function(pos_ND * scale, neg_ND * scale)
    torch.testing.assert_close(scaled * scale, plain, rtol=1e-3, atol=1e-4)


def test_equal_sides_have_no_direction(planted):
    _, pos_ND, _ = planted
    for method in (Method.MEAN_DIFFERENCE, Method.PCA):
        with pytest.raises(NotSteerable, match="no direction"):
            direction(method, pos_ND, pos_ND)


def test_sides_of_unequal_shape_are_refused(planted):
    _, pos_ND, neg_ND = planted
    with pytest.raises(ShapeMismatch, match=r"\[N, D\]"):
        direction(Method.PCA, pos_ND, neg_ND[:-1])


def test_controls_are_unit_and_seeded(planted):
    _, pos_ND, neg_ND = planted
    assert torch.equal(random_direction(D, 1), random_direction(D, 1))
    assert not torch.equal(random_direction(D, 1), random_direction(D, 2))
    shuffled = shuffled_difference(pos_ND, neg_ND, 0)
    assert float(shuffled.norm()) == pytest.approx(1, abs=1e-6)
    assert abs(float(shuffled @ direction(Method.MEAN_DIFFERENCE, pos_ND, neg_ND))) < 0.99
