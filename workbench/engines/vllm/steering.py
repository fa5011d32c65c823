"""The worker's part, whatever the runner: which row each token of a step has, and the proof.

A runner adapter says which requests come and go (`add`, `remove`) and what runs in a step (`expand`
on the device, or `place` from the host). Knows nothing of vLLM.

Letters: S slots, one for each request that can run at once; N requests and T tokens of one step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vectors.errors import WorkbenchError
from vectors.types import Phase
from workbench.engines.vllm.edit import EditTable
from workbench.engines.vllm.rows import RowBank
from workbench.engines.vllm.spec import STEER, STEER_ID, Resolved

__all__ = ["Steering"]

RECEIPTS_KEPT = 20_000
PROMPT_ROW, DECODE_ROW, LENGTH, START = range(4)

Array = np.ndarray[Any, Any]
Expand = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], None]


@dataclass
class _Proof:
    """What was steered of one request: positions `first` to `end`, seen over its whole life."""

    length: int
    start: int
    rows: tuple[int, int]
    blocks: tuple[int, int]
    cached: int
    end: int = 0
    problem: str = ""

    def counts(self) -> dict[str, int]:
        def steered(low: int, high: int) -> int:
            return max(0, high - max(low, self.start))

        in_prompt, in_decode = bool(self.rows[0]), bool(self.rows[1])
        cached, end = self.cached, max(self.end, self.cached)
        return {
            "prompt": in_prompt * steered(cached, min(end, self.length)),
            "decode": in_decode * steered(max(cached, self.length), end),
            "cached": in_prompt * steered(0, min(cached, self.length))
            + in_decode * steered(self.length, cached),
        }


class Steering:
    """Slots, rows and receipts of one worker."""

    def __init__(self, table: EditTable, bank: RowBank, slots: int, expand: Expand) -> None:
        self.table = table
        self.bank = bank
        self._expand = expand
        self._device = table.row_of_token_T.device
        self._slots_S4 = np.zeros((slots, 4), dtype=np.int32)
        self._device_slots_S4 = torch.zeros(slots, 4, dtype=torch.int32, device=self._device)
        self._changed = False
        self._written = 0
        self._slot_of: dict[str, int] = {}
        self._free = list(range(slots))
        self._given = False
        self._end_S = np.zeros(slots, dtype=np.int64)
        self._live: dict[str, tuple[str, _Proof]] = {}
        self._proofs: OrderedDict[str, dict[str, _Proof]] = OrderedDict()
        self.probe: Tensor | None = None
        self.refused: dict[str, str] = {}

    # -- requests come and go -------------------------------------------------------------------

    def add(
        self,
        request: str,
        extra: Mapping[str, Any] | None,
        length: int,
        computed: int,
        slot: int | None = None,
    ) -> None:
        """A request begins, or goes on after it was preempted; `computed` positions are cached."""
        self.remove(request)
        self._given = slot is not None
        if slot is None:
            slot = self._free.pop()
        self._slot_of[request] = slot
        steer = (extra or {}).get(STEER)
        if not steer:
            return
        self._end_S[slot] = 0
        receipt = (extra or {}).get(STEER_ID) or ""
        proof = self._rows(slot, steer, length, computed)
        if proof.problem:
            self.refused[request] = proof.problem
        proofs = self._proofs.setdefault(receipt, {}) if receipt else {}
        # Going on after a preemption keeps what was cached at first and how far it had come.
        before = proofs.get(request)
        if before is not None:
            proof.cached, proof.end = before.cached, before.end
        proofs[request] = proof
        self._live[request] = (receipt, proof)
        while len(self._proofs) > RECEIPTS_KEPT:
            self._proofs.popitem(last=False)

    def _rows(self, slot: int, steer: str, length: int, computed: int) -> _Proof:
        taken: list[int] = []
        blocks: list[int] = []
        try:
            resolved = Resolved.from_json(steer)
            for phase in (Phase.PROMPT, Phase.DECODE):
                row = resolved.at(phase)
                taken.append(self.bank.acquire(row))
                blocks.append(row.blocks)
        except WorkbenchError as error:
            # The engine must live on; this request alone ends with an error (see `refusal`).
            for number in taken:
                self.bank.release(number)
            return _Proof(length, 0, (0, 0), (0, 0), computed, problem=str(error))
        self._slots_S4[slot] = (taken[0], taken[1], length, resolved.start)
        self._changed = True
        rows, counts = (taken[0], taken[1]), (blocks[0], blocks[1])
        return _Proof(length, resolved.start, rows, counts, computed)

    def remove(self, request: str) -> None:
        """A request has ended or was preempted; unknown ones are none of ours."""
        slot = self._slot_of.pop(request, None)
        if slot is None:
            return
        if not self._given:
            self._free.append(slot)
        if request not in self._live:
            return  # its slot says nothing, and has never said anything else
        self._note(request, slot)
        for row in self._slots_S4[slot, [PROMPT_ROW, DECODE_ROW]].tolist():
            self.bank.release(row)
        self._slots_S4[slot] = 0
        self._changed = True
        del self._live[request]

    def knows(self, request: str) -> bool:
        """Whether the request was added and not removed."""
        return request in self._slot_of

    def slots(self, requests: list[str]) -> Array:
        """The slots of a step's requests, `[N]`."""
        slot_of = self._slot_of
        return np.fromiter((slot_of[r] for r in requests), dtype=np.int64, count=len(requests))

    # -- one step -------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether no request is steered and the buffer says so too."""
        return not self.bank.used and not self._written

    def expand(
        self,
        positions_T: Tensor,
        first_token_N1: Tensor,
        slot_of_request_N: Tensor,
        requests: int,
        tokens: int,
    ) -> None:
        """Set the rows of a step whose batch lies on the device; `tokens` counts the padding."""
        if self.idle:
            return
        if self._changed:
            self._upload()
        self._expand(
            self.table.row_of_token_T[: max(tokens, self._written)],
            positions_T,
            first_token_N1,
            slot_of_request_N,
            self._device_slots_S4,
            requests,
        )
        self._written = tokens if self.bank.used else 0

    def warm_up(self) -> None:
        """Compile what a step needs, before somebody waits for it."""
        slots_N = torch.zeros(1, dtype=torch.int32, device=self._device)
        ends_N1 = torch.tensor([0, 1], dtype=torch.int32, device=self._device)
        positions_T = torch.zeros(1, dtype=torch.int64, device=self._device)
        rows_T = self.table.row_of_token_T[:1]
        self._expand(rows_T, positions_T, ends_N1, slots_N, self._device_slots_S4, 1)

    def _upload(self) -> None:
        slots_S4 = torch.from_numpy(self._slots_S4.copy())
        if self._device.type == "cuda":
            slots_S4 = slots_S4.pin_memory()
        self._device_slots_S4.copy_(slots_S4, non_blocking=True)
        self._changed = False

    def place(self, slots_N: Array, starts_N: Array, counts_N: Array) -> None:
        """Set the rows of a step whose batch is known to the host."""
        if self.idle:
            return
        tokens = int(counts_N.sum())
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
        self._written = tokens if self.bank.used else 0

    def rest(self) -> None:
        """Set every row to 0, or to the self-test's: a batch that belongs to no request."""
        if self.probe is not None:
            self._fill(self.probe)
            self._written = len(self.probe)
        elif self._written:
            self.table.row_of_token_T[: self._written].zero_()
            self._written = 0

    def _fill(self, rows_T: Tensor) -> None:
        if self._device.type == "cuda":
            rows_T = rows_T.pin_memory()
        self.table.row_of_token_T[: len(rows_T)].copy_(rows_T, non_blocking=True)

    def ran(self, slots_N: Array, ends_N: Array) -> None:
        """Note how far the requests of a step come with it."""
        if self._live:
            self._end_S[slots_N] = np.maximum(self._end_S[slots_N], ends_N)

    # -- proof ----------------------------------------------------------------------------------

    def _note(self, request: str, slot: int) -> None:
        if request in self._live:
            proof = self._live[request][1]
            proof.end = max(proof.end, int(self._end_S[slot]))

    def receipt(self, receipt: str) -> dict[str, int | str]:
        """Take the receipt: how many requests it covers and the distinct positions per phase."""
        proofs = self._proofs.pop(receipt, {})
        for request in proofs:
            if request in self._slot_of:
                self._note(request, self._slot_of[request])
        counts = [proof.counts() for proof in proofs.values()]
        total = {k: sum(c[k] for c in counts) for k in ("prompt", "decode", "cached")}
        return {
            "requests": len(proofs),
            **total,
            "rows": max((max(p.blocks) for p in proofs.values()), default=0),
            "least": min((sum(c.values()) for c in counts), default=0),
            "problem": next((p.problem for p in proofs.values() if p.problem), ""),
        }
