"""Which row of a table each token of a step has, set on the device or from the host.

A request that runs has a slot, and a slot says which row its prompt's positions have and which the
generated ones; positions before the slot's start have row 0.

Letters: S slots, N requests and T tokens of one step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["DECODE_ROW", "LENGTH", "PROMPT_ROW", "START", "Array", "Expand", "TokenRows"]

PROMPT_ROW, DECODE_ROW, LENGTH, START = range(4)

Array = np.ndarray[Any, Any]
Expand = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], None]


class TokenRows:
    """Fills `row_of_token_T` each step; whoever inherits writes `_slots_S4` and says `_changed`."""

    def __init__(self, row_of_token_T: Tensor, slots: int, expand: Expand) -> None:
        self._row_of_token_T = row_of_token_T
        self._expand = expand
        self._device = row_of_token_T.device
        self._slots_S4 = np.zeros((slots, 4), dtype=np.int32)
        self._device_slots_S4 = torch.zeros(slots, 4, dtype=torch.int32, device=self._device)
        self._changed = False
        self._written = 0
        self._standing: tuple[bytes, int] | None = None
        self._repeated = False
        self.probe: Tensor | None = None

    def grow(self) -> None:
        """Twice as many slots, for a runner whose batches are known to the host."""
        self._slots_S4 = np.concatenate([self._slots_S4, np.zeros_like(self._slots_S4)])

    @property
    def _used(self) -> bool:
        """Whether any slot has a row."""
        raise NotImplementedError

    @property
    def idle(self) -> bool:
        """Whether no slot has a row and the buffer says so too."""
        return not self._used and not self._written

    def _before(self) -> None:
        """Look at what the last step has done, before the next one's rows are set."""

    def expand(
        self,
        positions_T: Tensor,
        first_token_N1: Tensor,
        slot_of_request_N: Tensor,
        requests: int,
        tokens: int,
        decoding: tuple[Array, Array] | None = None,
    ) -> None:
        """Set the rows of a step whose batch lies on the device; `tokens` counts the padding.

        `decoding` has the slots and the positions, both `[N]`, where every request runs one: most steps
        repeat the one before them with the same rows, and cost nothing.
        """
        self._before()
        if not self._used and not self._written:
            return
        if self._stands(decoding, tokens):
            return
        if self._changed:
            self._upload()
        self._expand(
            self._row_of_token_T[: max(tokens, self._written)],
            positions_T,
            first_token_N1,
            slot_of_request_N,
            self._device_slots_S4,
            requests,
        )
        self._written = tokens if self._used else 0

    def _stands(self, decoding: tuple[Array, Array] | None, tokens: int) -> bool:
        """Whether the buffer holds this step's rows already; what it holds after it is noted."""
        last, self._standing, self._repeated = self._standing, None, False
        if decoding is None:
            return False
        slots_N, positions_N = decoding
        # Bytes, because comparing arrays takes many times as long while the caches are cold.
        step = slots_N.tobytes(), tokens
        self._repeated = step == last and not self._changed
        # Behind the prompt and the start a request keeps its row for as long as it keeps its slot.
        if self._repeated or (positions_N >= self._slots_S4[slots_N, LENGTH:].max(-1)).all():
            self._standing = step
        return self._repeated

    def look_again(self) -> None:
        """Take nothing from the last step: a request has gone back to positions that it has run before."""
        self._standing = None

    def warm_up(self) -> None:
        """Compile what a step needs, before somebody waits for it."""
        slots_N = torch.zeros(1, dtype=torch.int32, device=self._device)
        ends_N1 = torch.tensor([0, 1], dtype=torch.int32, device=self._device)
        positions_T = torch.zeros(1, dtype=torch.int64, device=self._device)
        rows_T = self._row_of_token_T[:1]
        self._expand(rows_T, positions_T, ends_N1, slots_N, self._device_slots_S4, 1)

    def _upload(self) -> None:
        slots_S4 = torch.from_numpy(self._slots_S4.copy())
        if self._device.type == "cuda":
            slots_S4 = slots_S4.pin_memory()
        self._device_slots_S4.copy_(slots_S4, non_blocking=True)
        self._changed = False

    def place(self, slots_N: Array, starts_N: Array, counts_N: Array) -> None:
        """Set the rows of a step whose batch is known to the host."""
        self._before()
        if not self._used and not self._written:
            return
        tokens = int(counts_N.sum())
        if self._stands((slots_N, starts_N) if tokens == len(counts_N) else None, tokens):
            return
        first_N = np.cumsum(counts_N) - counts_N
        positions_T = np.arange(tokens) + np.repeat(starts_N - first_N, counts_N)
        slots_T4 = np.repeat(self._slots_S4[slots_N], counts_N, axis=0)
        row_T = np.where(
            positions_T < slots_T4[:, LENGTH], slots_T4[:, PROMPT_ROW], slots_T4[:, DECODE_ROW]
        )
        row_T[positions_T < slots_T4[:, START]] = 0
        padded_T = np.zeros(max(tokens, self._written), dtype=np.int32)
        padded_T[:tokens] = row_T
        self._fill(torch.from_numpy(padded_T))
        self._changed = False
        self._written = tokens if self._used else 0

    def rest(self) -> None:
        """Set every row to 0, or to the self-test's: a batch that belongs to no request."""
        self._standing, self._repeated = None, False
        if self.probe is not None:
            self._fill(self.probe)
            self._written = len(self.probe)
        elif self._written:
            self._row_of_token_T[: self._written].zero_()
            self._written = 0

    def _fill(self, rows_T: Tensor) -> None:
        if self._device.type == "cuda":
            rows_T = rows_T.pin_memory()
        self._row_of_token_T[: len(rows_T)].copy_(rows_T, non_blocking=True)
