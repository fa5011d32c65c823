"""The best weights so far, by the loss on held-out decisions, and when to stop looking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from workbench.train.held_out import HeldOutLoss

__all__ = ["Best"]


class Best:
    """Follows the held-out loss of what is being learnt.

    Args:
        patience: measurements without improvement after which `exhausted` is true; 0 is never.
        keep: hold a copy of the best weights, in main memory.
    """

    def __init__(self, patience: int, keep: bool) -> None:
        self.patience, self.keep = patience, keep
        self.step, self.loss, self.misses = 0, float("inf"), 0
        self.weights: dict[str, Tensor] = {}

    @property
    def exhausted(self) -> bool:
        """Whether it has not improved for so long that training may stop."""
        return self.patience > 0 and self.misses >= self.patience

    def see(self, step: int, found: HeldOutLoss, weights: Mapping[str, Tensor]) -> None:
        """Note a measurement after `step`; without steered held-out decisions nothing is best."""
        if found.steered is None:
            return
        if not found.steered < self.loss:  # what is no number is not better
            self.misses += 1
            return
        self.step, self.loss, self.misses = step, found.steered, 0
        if self.keep:
            self.weights = {n: w.detach().to("cpu", copy=True) for n, w in weights.items()}

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Put the best weights back into `weights`."""
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(self.weights[name])

    def notes(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        loss = None if self.loss == float("inf") else self.loss
        return {"step": self.step, "loss": loss, "misses": self.misses}

    def resume(
        self, notes: Mapping[str, Any], kept: dict[str, Tensor], current: Mapping[str, Tensor]
    ) -> None:
        """Go on from a checkpoint's notes and the best weights in it, or its own where it had none."""
        self.step, self.misses = notes["step"], notes["misses"]
        self.loss = float("inf") if notes["loss"] is None else notes["loss"]
        if self.keep and self.step:
            source = kept or {n: w.detach().to("cpu", copy=True) for n, w in current.items()}
            self.weights = source
