"""The values that every part of the project passes around.

Shape letters: N pairs, T tokens, D width of the residual stream, L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from vectors.errors import BlockNotFound, DoseError, ShapeMismatch

__all__ = ["Method", "Phase", "SteeringVector"]


class Phase(StrEnum):
    """Which positions are steered."""

    PROMPT = "prompt"
    DECODE = "decode"
    ALL = "all"


class Method(StrEnum):
    """How the direction is read off the activations of a contrast set."""

    MEAN_DIFFERENCE = "mean-difference"
    PCA = "pca"
    LOGISTIC = "logistic"


@dataclass(frozen=True)
class SteeringVector:
    """Unit directions for blocks of one base, with the norms that turn a dose into an addition.

    A dose `d` at block `b` adds `d * mean_norms[b] * directions[b]` to the output of block `b`.

    Args:
        base: digest of the base that the directions belong to.
        directions: block to unit direction, fp32 `[D]`.
        mean_norms: block to the mean norm of the block's output over the completion tokens
            of the contrast set's training split.
        best_block: the block used when a term names none.
        info: method, contrast set, diagnostics, versions; JSON values only.

    Raises:
        ShapeMismatch: directions of unequal widths, or not one-dimensional.
        BlockNotFound: no direction, or no norm for a direction, or no direction at the best block.
        DoseError: a direction or norm that is zero or not finite.
    """

    base: str
    directions: Mapping[int, Tensor]
    mean_norms: Mapping[int, float]
    best_block: int
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.best_block not in self.directions:
            raise BlockNotFound(
                f"The vector has no direction at its best block {self.best_block}; "
                f"it has blocks {sorted(self.directions)}."
            )
        widths = {tuple(d.shape) for d in self.directions.values()}
        if len(widths) != 1 or len(next(iter(widths))) != 1:
            raise ShapeMismatch(
                f"Directions must all have one width [D]; found shapes {sorted(widths)}."
            )
        for block, direction_D in self.directions.items():
            norm = float(direction_D.float().norm())
            if not math.isfinite(norm) or abs(norm - 1.0) > 1e-3:
                raise DoseError(
                    f"The direction at block {block} must have norm 1, not {norm:.6g}; "
                    "a zero or infinite direction cannot steer."
                )
            mean_norm = self.mean_norms.get(block, math.nan)
            if not math.isfinite(mean_norm) or mean_norm <= 0:
                raise DoseError(
                    f"Block {block} needs a positive mean norm to turn a dose into an addition, "
                    f"not {mean_norm}."
                )

    @property
    def width(self) -> int:
        """D, the width of the residual stream."""
        return next(iter(self.directions.values())).shape[0]

    def addition(self, block: int, dose: float) -> Tensor:
        """Return `dose * mean_norms[block] * directions[block]`, fp32 `[D]`.

        Raises:
            BlockNotFound: the vector has no direction at `block`.
            DoseError: the dose is not finite.
        """
        if block not in self.directions:
            raise BlockNotFound(
                f"The vector has no direction at block {block}; it has {sorted(self.directions)}."
            )
        if not math.isfinite(dose):
            raise DoseError(f"A dose must be a finite number, not {dose}.")
        return self.directions[block].to(torch.float32) * (dose * self.mean_norms[block])
