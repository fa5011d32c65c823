"""Read a direction off the activations of contrast pairs, one block at a time.

Shape letters: N pairs, L blocks, D width of the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vectors.errors import NotSteerable, ShapeMismatch
from vectors.types import Method

__all__ = ["METHODS", "MethodRow", "direction", "logistic", "mean_difference", "pca"]


def mean_difference(pos_ND: Tensor, neg_ND: Tensor) -> Tensor:
    """Return the mean of the pair differences, `mean_i (pos_i - neg_i)`, `[D]`.

    Source: Rimsky et al., "Steering Llama 2 via Contrastive Activation Addition"
    (arXiv:2312.06681), section 3.
    """
    return (pos_ND - neg_ND).mean(0)


def pca(pos_ND: Tensor, neg_ND: Tensor) -> Tensor:
    """Return the first principal component of the differences about zero, towards the positive side.

    With `d_i = pos_i - neg_i`: the right singular vector of the `[N, D]` matrix of `d_i` that has
    the largest singular value; the sign makes `mean_i <d_i, v>` positive.

    Source: Zou et al., "Representation Engineering" (arXiv:2310.01405), section 3.1.
    """
    diffs_ND = pos_ND - neg_ND
    _, _, components_ND = torch.linalg.svd(diffs_ND, full_matrices=False)
    v_D = components_ND[0]
    return v_D if float((diffs_ND @ v_D).mean()) >= 0 else -v_D


def logistic(pos_ND: Tensor, neg_ND: Tensor) -> Tensor:
    """Return the weights of a logistic regression that tells positive from negative, `[D]`.

    The features are standardised for the fit; the weights are divided by the standard deviations
    again, so that the direction lies in the residual stream and not in the fit's own space.
    """
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415  # heavy, and rarely chosen

    x = torch.cat([pos_ND, neg_ND]).double().numpy()
    y = np.repeat([1, 0], [len(pos_ND), len(neg_ND)])
    std = x.std(0) + 1e-8
    fit = LogisticRegression(C=0.1, max_iter=2000).fit((x - x.mean(0)) / std, y)
    return torch.from_numpy(fit.coef_[0] / std).float()


@dataclass(frozen=True)
class MethodRow:
    """One way to read a direction: the choices of page, command line and documentation."""

    label: str
    source: str
    function: Callable[[Tensor, Tensor], Tensor]


METHODS: dict[Method, MethodRow] = {
    Method.MEAN_DIFFERENCE: MethodRow("Mean difference", "arXiv:2312.06681", mean_difference),
    Method.PCA: MethodRow("First principal component", "arXiv:2310.01405", pca),
    Method.LOGISTIC: MethodRow("Logistic regression", "scikit-learn", logistic),
}


def direction(method: Method, pos_ND: Tensor, neg_ND: Tensor) -> Tensor:
    """Return the unit direction of `method`, fp32 `[D]`.

    Raises:
        ShapeMismatch: the sides do not match.
        NotSteerable: the two sides do not differ, so there is no direction.
    """
    if pos_ND.shape != neg_ND.shape or pos_ND.ndim != 2 or not len(pos_ND):
        raise ShapeMismatch(
            f"Both sides must be [N, D] with the same N > 0, not {tuple(pos_ND.shape)} and "
            f"{tuple(neg_ND.shape)}."
        )
    scale = float(pos_ND.float().norm(dim=1).mean())
    differ = float((pos_ND - neg_ND).float().norm(dim=1).mean()) > 1e-6 * scale
    raw_D = METHODS[method].function(pos_ND.float(), neg_ND.float()) if differ else torch.zeros(1)
    norm = float(raw_D.norm())
    if not math.isfinite(norm) or norm == 0:
        raise NotSteerable(
            "The positive and the negative side give the same activations, so there is no "
            "direction; check that the two sides of the set really differ."
        )
    return raw_D / norm
