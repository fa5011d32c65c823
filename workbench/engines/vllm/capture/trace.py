"""The projection of each generated position on a direction, noted as it runs.

A row holds the sum of the residual stream over what has run since the last note, which is one position.
Before each step all rows are projected together, on the device, and emptied; what was found reaches
the host behind the steps that are on their way, and nobody waits for it until a reply has ended.

Letters: N traced requests, L blocks, R rows, D width.
"""

from __future__ import annotations

from array import array
from collections import deque
from typing import Any

import torch
from torch import Tensor

__all__ = ["Trace", "Traces"]

OWN_BYTES = 1024
"""What a trace without values takes, roughly."""
PREEMPTED = "it was preempted on the way; ask again when the engine has less to do"


class Trace:
    """What is known of one request, along `direction_D` in units of the block's mean norm.

    `values` are those on the host, in order; `end` is the position behind the last that was noted.
    """

    def __init__(self, direction_D: Tensor, mean_norm: float) -> None:
        self.along_D: Tensor | None = direction_D / mean_norm
        self.values = array("f")
        self.problem = ""
        self.end = 0
        self.ran = 0
        self.length = 0

    @property
    def nbytes(self) -> int:
        """What it takes on the host; 4 bytes for each position."""
        return OWN_BYTES + self.values.itemsize * max(0, self.end - self.length)

    def go_on(self, before: Trace) -> None:
        """Go on behind what was noted of the same request before it was preempted."""
        self.values, self.problem = before.values, before.problem
        self.end, self.ran, self.length = before.end, before.ran, before.length

    def grown(self) -> bool:
        """Whether one position has run since this was asked last."""
        new = self.ran - max(self.end, self.length)
        if new <= 0 or self.problem:
            return False
        if new > 1:
            self.problem = PREEMPTED
            return False
        self.end = self.ran
        return True


class Traces:
    """All traces of one worker."""

    def __init__(self, sum_LRD: Tensor) -> None:
        self._rows = sum_LRD.shape[1]
        self._sum_XD = sum_LRD.view(-1, sum_LRD.shape[-1])
        self._at: dict[Trace, int] = {}
        self._places: tuple[Tensor, Tensor] | None = None
        self._coming: deque[tuple[Any, Tensor, list[tuple[int, Trace]]]] = deque()

    def add(self, trace: Trace, block: int, row: int) -> None:
        """Trace what is summed in a row, which is empty now."""
        self._at[trace] = block * self._rows + row
        self._places = None

    def remove(self, trace: Trace) -> None:
        """Trace it no more; what was noted still comes."""
        if self._at.pop(trace, None) is not None:
            trace.along_D = self._places = None

    def note(self) -> None:
        """Note what has run since the last time."""
        self._arrive()
        grown = [(n, trace) for n, trace in enumerate(self._at) if trace.grown()]
        if not grown:
            return
        at_N, along_ND = self._places = self._places or self._place()
        value_N = (self._sum_XD.index_select(0, at_N) * along_ND).sum(-1)
        # A row that has not grown holds nothing.
        self._sum_XD.index_fill_(0, at_N, 0)
        event = None
        if value_N.is_cuda:
            host_N = torch.empty(value_N.shape, pin_memory=True)
            host_N.copy_(value_N, non_blocking=True)
            value_N, event = host_N, torch.cuda.Event()
            event.record()
        self._coming.append((event, value_N, grown))
        self._arrive()

    def _place(self) -> tuple[Tensor, Tensor]:
        at_N = torch.tensor(list(self._at.values()))
        if self._sum_XD.is_cuda:
            at_N = at_N.pin_memory().to(self._sum_XD.device, non_blocking=True)
        along = [trace.along_D for trace in self._at if trace.along_D is not None]
        return at_N, torch.stack(along)

    def _arrive(self, wait: bool = False) -> None:
        """Take what has reached the host, or wait for all that is on its way."""
        while self._coming:
            event, value_N, grown = self._coming[0]
            if event is not None and not event.query():
                if not wait:
                    return
                event.synchronize()
            self._coming.popleft()
            values = value_N.tolist()
            for n, trace in grown:
                trace.values.append(values[n])

    def wait(self) -> None:
        """Wait until all that was noted is on the host."""
        self._arrive(wait=True)
