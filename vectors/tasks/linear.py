"""Task arithmetic on one tensor.

Shape letters: K task vectors, P elements of a part of the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vectors.errors import ShapeMismatch
from vectors.tasks.delta import PART, check_alike, delta

__all__ = ["combine"]


def combine(base: Tensor, terms: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Return `base + sum_i weight_i * (tuned_i - base)` in the base's dtype.

    In fp32, the terms summed in the order given, then added to the base and rounded once. Elements
    that no term moves keep their bits, and one term of weight exactly 1 is the tuned tensor itself.

    Args:
        terms: weight and tuned tensor of each task vector that changes this tensor.

    Raises:
        ShapeMismatch: shapes or dtypes that differ, or integers to be mixed.
    """
    for _, tuned in terms:
        check_alike(base, tuned)
    if len(terms) == 1 and terms[0][0] == 1.0:
        return terms[0][1]
    if terms and not base.dtype.is_floating_point:
        raise ShapeMismatch(
            f"A tensor of {base.dtype} cannot be scaled or mixed; "
            "use its one task vector at weight 1."
        )
    out = torch.empty(base.shape, dtype=base.dtype)
    flat = [base.detach().reshape(-1), out.view(-1), *(tuned.reshape(-1) for _, tuned in terms)]
    for start in range(0, base.numel(), PART):
        base_P, out_P, *tuned_KP = (x[start : start + PART] for x in flat)
        total_P = torch.zeros(len(base_P))
        for (weight, _), tuned_P in zip(terms, tuned_KP, strict=True):
            # Two roundings, not a fused one, so that every machine gets the same bits.
            total_P += delta(base_P, tuned_P).mul_(weight)
        torch.where(total_P == 0, base_P, (base_P.float() + total_P).to(base.dtype), out=out_P)
    return out
