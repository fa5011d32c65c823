"""Intervals, permutation p-values, divergences and repetition: the controls' arithmetic."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["bootstrap_mean", "permutation_p", "repetition", "table_kl"]


def bootstrap_mean(
    values: Sequence[float], *, level: float = 0.95, draws: int = 4000, seed: int = 0
) -> tuple[float, float, float]:
    """Return mean, low and high of the percentile bootstrap interval of the mean."""
    x = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = x[rng.integers(0, len(x), (draws, len(x)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(x.mean()), float(low), float(high)


def permutation_p(statistic: float, controls: Sequence[float]) -> float:
    """Return `(1 + #{control >= statistic}) / (K + 1)`: 19 controls are the fewest for 0.05."""
    return (1 + sum(c >= statistic for c in controls)) / (len(controls) + 1)


def table_kl(p: Mapping[int, float], q: Mapping[int, float]) -> float:
    """Return KL(p || q) in nats from two tables of the likeliest tokens' log-probabilities.

    Tokens in both tables count one by one and all others as one bucket. Joining outcomes can only
    lower a divergence (data-processing inequality), so this is a lower bound; with a few hundred
    tokens a table it is within a percent of the exact value (docs/log.md).
    """
    shared = p.keys() & q.keys()
    total, p_rest, q_rest = 0.0, 1.0, 1.0
    for token in shared:
        mass = math.exp(p[token])
        total += mass * (p[token] - q[token])
        p_rest -= mass
        q_rest -= math.exp(q[token])
    p_rest, q_rest = max(p_rest, 1e-12), max(q_rest, 1e-12)
    return max(total + p_rest * math.log(p_rest / q_rest), 0.0)


def repetition(text: str, n: int = 3) -> float:
    """Return the share of word n-grams that occurred before in the text: 0 fresh, 1 a loop."""
    words = text.lower().split()
    grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    total = sum(grams.values())
    return 0.0 if not total else 1 - len(grams) / total
