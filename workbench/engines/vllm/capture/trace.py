"""The projection of each generated position on a direction, out of sums that only grow.

A row holds the sum of the residual stream over the positions that have run. Before each step the sum's
projection is noted, on the device and without waiting; from one note to the next it grew by that of one
position.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Trace"]


class Trace:
    """Notes of one request's sum along `direction_D`, in units of the block's mean norm."""

    def __init__(self, direction_D: Tensor, mean_norm: float) -> None:
        self._along_D = direction_D / mean_norm
        self._sums: list[Tensor] = []
        self._end = 0
        self.problem = ""

    def note(self, sum_D: Tensor, length: int, end: int) -> None:
        """The sum now holds the positions from `length` to `end`."""
        new = end - max(self._end, length)
        if new <= 0:
            return
        if new > 1:
            # A request that was preempted runs again what it had generated, all in one step.
            self.problem = "it was preempted on the way; ask again when the engine has less to do"
        self._end = end
        self._sums.append(torch.dot(sum_D, self._along_D))

    def values(self) -> Tensor:
        """The projections of the generated positions, `[T]` float32 on the host."""
        if not self._sums:
            return torch.zeros(0)
        sums_T = torch.stack(self._sums).double()
        return sums_T.diff(prepend=sums_T.new_zeros(1)).float().cpu()
