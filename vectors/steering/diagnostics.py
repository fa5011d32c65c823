"""How well a direction tells the two sides of held-out pairs apart, and how sure that is.

Letters: N pairs, D width. Scores are projections `s = <h, v>` of activations on a unit direction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

__all__ = [
    "FEWEST_TO_TELL",
    "Separation",
    "agreement",
    "auroc",
    "cohens_d",
    "pair_accuracy",
    "separation",
    "steerable",
]


def auroc(pos_N: Tensor, neg_N: Tensor) -> float:
    """Return P(s+ > s-) + P(s+ = s-)/2 over all cross pairs: the area under the ROC curve."""
    greater = (pos_N[:, None] > neg_N[None, :]).double().mean()
    equal = (pos_N[:, None] == neg_N[None, :]).double().mean()
    return float(greater + equal / 2)


def cohens_d(pos_N: Tensor, neg_N: Tensor) -> float:
    """Return `(mean s+ - mean s-) / sqrt((var s+ + var s-) / 2)`, the standardised difference."""
    if len(pos_N) < 2:
        return 0.0
    pooled = math.sqrt(float(pos_N.double().var() + neg_N.double().var()) / 2)
    return float(pos_N.double().mean() - neg_N.double().mean()) / max(pooled, 1e-12)


def pair_accuracy(pos_N: Tensor, neg_N: Tensor) -> float:
    """Return the share of pairs with `s+ > s-`, ties counted half."""
    return float((pos_N > neg_N).double().mean() + (pos_N == neg_N).double().mean() / 2)


def agreement(diffs_ND: Tensor) -> float:
    """Return the mean cosine between pair differences, over all `i < j`.

    `A = (N |mean_i d_i/|d_i||^2 - 1) / (N - 1)`. Where it is low the pairs pull in many directions
    and no single one will steer. Source: Braun et al. (arXiv:2505.22637), section 4.
    """
    n = len(diffs_ND)
    if n < 2:
        return 0.0
    units_ND = diffs_ND.double() / diffs_ND.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
    return float((n * units_ND.mean(0).square().sum() - 1) / (n - 1))


@dataclass(frozen=True)
class Separation:
    """The diagnostics of one block."""

    auroc: float
    cohens_d: float
    pair_accuracy: float
    agreement: float

    @property
    def rank(self) -> tuple[float, float]:
        """What the best block is chosen by: AUROC and pair accuracy together, then Cohen's d."""
        return (round((self.auroc + self.pair_accuracy) / 2, 2), self.cohens_d)


def separation(direction_D: Tensor, pos_ND: Tensor, neg_ND: Tensor) -> Separation:
    """Measure a unit direction on held-out pairs."""
    v_D = direction_D.double()
    pos_N, neg_N = pos_ND.double() @ v_D, neg_ND.double() @ v_D
    return Separation(
        auroc(pos_N, neg_N),
        cohens_d(pos_N, neg_N),
        pair_accuracy(pos_N, neg_N),
        agreement(pos_ND - neg_ND),
    )


FEWEST_TO_TELL = 5
"""Held-out pairs that a coin orders rightly in fewer than one case of twenty."""


def steerable(found: Separation, pairs: int) -> str:
    """Return "yes", "marginal" or "no" for a direction measured on `pairs` held-out pairs.

    "no" where the order of the pairs could be a coin's (one-sided binomial test, p > 0.05), "yes"
    where at least four pairs in five are in order and AUROC is at least 0.75. Agreement is shown
    beside it and not part of the rule: averaged over completions about unrelated things it stays
    near 0.1 for directions that steer well (docs/log.md).
    """
    right = round(found.pair_accuracy * pairs)
    chance = sum(math.comb(pairs, k) for k in range(right, pairs + 1)) / 2**pairs
    if chance > 0.05 or found.auroc <= 0.5:
        return "no"
    return "yes" if found.pair_accuracy >= 0.8 and found.auroc >= 0.75 else "marginal"
