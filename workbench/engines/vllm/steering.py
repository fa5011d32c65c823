"""The worker's part, whatever the runner: which row each token of a step has, and the proof.

A runner adapter says which requests come and go (`add`, `remove`) and what runs in a step (`expand`
on the device, or `place` from the host). Knows nothing of vLLM.

Letters: S slots, one for each request that can run at once; N requests and T tokens of one step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from vectors.errors import WorkbenchError
from vectors.types import Phase
from workbench.engines.vllm.capture.captures import Captures
from workbench.engines.vllm.capture.spec import PROJECT, read_projected
from workbench.engines.vllm.capture.trace import Trace
from workbench.engines.vllm.conditions import Conditions
from workbench.engines.vllm.edit import EditTable
from workbench.engines.vllm.receipts import Proof, Receipt, Receipts
from workbench.engines.vllm.rows import RowBank
from workbench.engines.vllm.spec import STEER, STEER_ID, Resolved
from workbench.engines.vllm.tokens import DECODE_ROW, Array, Expand, TokenRows

__all__ = ["Steering"]


class Steering(TokenRows):
    """Slots, rows and receipts of one worker, and what it captures where it was started for that.

    `agree` takes what hinders this worker, or "", and returns what hinders any that shares the model:
    where one of them cannot steer a request, none may.
    """

    def __init__(
        self,
        table: EditTable,
        bank: RowBank,
        slots: int,
        expand: Expand,
        captures: Captures | None = None,
        agree: Callable[[str], str] = str,
    ) -> None:
        super().__init__(table.row_of_token_T, slots, expand)
        self.table = table
        self.bank = bank
        self.captures = captures
        self._agree = agree
        self._conditions = Conditions(captures)
        self._slot_of: dict[str, int] = {}
        self._free = list(range(slots))
        self._given = False
        self._end_S = np.zeros(slots, dtype=np.int64)
        self._ran: tuple[Array, Array, Array] | None = None
        self._live: dict[str, tuple[Receipt, Proof]] = {}
        self._receipts = Receipts()
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
            slot = self._free.pop() if self._free else self._grow()
        if why := self._capture(request, extra or {}, length, computed, slot):
            self.refused[request] = why
        self._slot_of[request] = slot
        steer = (extra or {}).get(STEER)
        if not steer:
            return
        self._end_S[slot] = 0
        receipt = self._receipts.under((extra or {}).get(STEER_ID) or "")
        proof = self._rows(request, slot, steer, length, computed)
        if proof.problem:
            self.refused[request] = proof.problem
        receipt.begin(request, proof)
        self._live[request] = (receipt, proof)

    def _capture(
        self, request: str, extra: Mapping[str, Any], length: int, computed: int, slot: int
    ) -> str:
        if self.captures is None:
            return ""
        if PROJECT not in extra:
            return self.captures.add(request, extra, length, computed, slot)
        why = ""
        try:
            digest, block = read_projected(extra[PROJECT])
            trace = Trace(*self.bank.direction(digest, block))
            why = self.captures.trace(request, extra, trace, block=block, length=length, slot=slot)
        except WorkbenchError as error:
            why = str(error)
        why = self._agree(why)
        return self.captures.refuse(request, extra, why) if why else ""

    def _grow(self) -> int:
        """Make room for as many again: a preempted request keeps its slot while others take its turn."""
        slots = len(self._slots_S4)
        self.grow()
        if self.captures is not None:
            self.captures.grow()
        self._end_S = np.concatenate([self._end_S, np.zeros_like(self._end_S)])
        self._free = list(range(slots + 1, 2 * slots))
        return slots

    def _rows(self, request: str, slot: int, steer: str, length: int, computed: int) -> Proof:
        taken: list[int] = []
        blocks: list[int] = []
        start, problem, conditional = 0, "", False
        decision = self._conditions.decision(request)
        try:
            resolved = Resolved.from_json(steer)
            start = resolved.start
            for phase in (Phase.PROMPT, Phase.DECODE):
                row = resolved.at(phase)
                taken.append(self.bank.acquire(row))
                blocks.append(row.blocks)
            conditional = resolved.condition is not None
            if (condition := resolved.condition) is not None and decision is None:
                direction_D, _ = self.bank.direction(condition.vector, condition.block)
                self._conditions.add(
                    request, condition, direction_D, length=length, computed=computed, slot=slot
                )
        except WorkbenchError as error:
            problem = str(error)
        if problem := self._agree(problem):
            # The engine must live on; this request alone ends with an error (see `refusal`).
            for number in taken:
                self.bank.release(number)
            self._conditions.remove(request)
            return Proof(length, 0, (0, 0), (0, 0), computed, problem=problem)
        steered = not conditional or (decision is not None and decision.steered)
        self._slots_S4[slot] = (taken[0], taken[1] if steered else 0, length, start)
        self._changed = True
        rows, counts = (taken[0], taken[1]), (blocks[0], blocks[1])
        return Proof(length, start, rows, counts, computed, decision=decision)

    def remove(self, request: str) -> None:
        """A request has ended or was preempted; unknown ones are none of ours."""
        self._settle()  # before anybody else has its slot
        if self.captures is not None:
            self.captures.remove(request)
        slot = self._slot_of.pop(request, None)
        if slot is None:
            return
        if not self._given:
            self._free.append(slot)
        if request not in self._live:
            return  # its slot says nothing, and has never said anything else
        receipt, proof = self._live.pop(request)
        self._note(proof, slot)
        receipt.end(request)
        self._conditions.remove(request)
        for row in proof.rows:
            self.bank.release(row)
        self._slots_S4[slot] = 0
        self._changed = True

    def knows(self, request: str) -> bool:
        """Whether the request was added and not removed."""
        return request in self._slot_of

    def slots(self, requests: list[str]) -> Array:
        """The slots of a step's requests, `[N]`."""
        slot_of = self._slot_of
        return np.fromiter((slot_of[r] for r in requests), dtype=np.int64, count=len(requests))

    # -- one step -------------------------------------------------------------------------------

    @property
    def _used(self) -> bool:
        return bool(self.bank.used)

    @property
    def idle(self) -> bool:
        """Whether no request is steered or captured, and the buffers say so too."""
        return super().idle and (self.captures is None or self.captures.idle)

    def expand(
        self,
        positions_T: Tensor,
        first_token_N1: Tensor,
        slot_of_request_N: Tensor,
        requests: int,
        tokens: int,
        decoding: tuple[Array, Array] | None = None,
    ) -> None:
        """Set the rows of a step whose batch lies on the device; see `TokenRows.expand`."""
        batch = positions_T, first_token_N1, slot_of_request_N, requests, tokens, decoding
        super().expand(*batch)
        if self.captures is not None:
            self.captures.expand(*batch)

    def place(self, slots_N: Array, starts_N: Array, counts_N: Array) -> None:
        """Set the rows of a step whose batch is known to the host."""
        super().place(slots_N, starts_N, counts_N)
        if self.captures is not None:
            self.captures.place(slots_N, starts_N, counts_N)

    def look_again(self) -> None:
        """Take nothing from the last step: a request has gone back to positions that it has run before."""
        super().look_again()
        if self.captures is not None:
            self.captures.look_again()

    def _before(self) -> None:
        """Tell the requests whose prompts have run whether they are steered."""
        if not self._conditions.pending:
            return
        self._settle()
        ends = {request: int(self._end_S[self._slot_of[request]]) for request in self._live}
        for request, decision in self._conditions.decide(ends).items():
            proof = self._live[request][1]
            proof.decision = decision
            if decision.steered:
                self._slots_S4[self._slot_of[request], DECODE_ROW] = proof.rows[1]
                self._changed = True

    def rest(self) -> None:
        """Set every row to 0, or to the self-test's: a batch that belongs to no request."""
        super().rest()
        if self.captures is not None:
            self.captures.rest()

    def ran(self, slots_N: Array, starts_N: Array, counts_N: Array) -> None:
        """Note how far the requests of a step come with it; the arrays must stay as they are."""
        if self.captures is not None:
            self.captures.ran(slots_N, starts_N, counts_N)
        if not self._repeated:
            self._settle()
        # Of steps that repeat one another the last one comes furthest.
        self._ran = (slots_N, starts_N, counts_N) if self._live else None

    def _settle(self) -> None:
        if self._ran is not None:
            slots_N, starts_N, counts_N = self._ran
            self._end_S[slots_N] = np.maximum(self._end_S[slots_N], starts_N + counts_N)
            self._ran = None

    # -- proof ----------------------------------------------------------------------------------

    def _note(self, proof: Proof, slot: int) -> None:
        proof.end = max(proof.end, int(self._end_S[slot]))

    def receipt(self, name: str) -> dict[str, int | float | str | None]:
        """Take the receipt: how many requests it covers and the distinct positions per phase."""
        self._settle()
        receipt = self._receipts.take(name)
        for request, (of, proof) in self._live.items():
            if of is receipt:
                self._note(proof, self._slot_of[request])
        return receipt.told()
