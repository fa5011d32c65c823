"""The worker's part, whatever the runner: which rows to add to which positions, and the proof.

Letters: R rows, D width, T tokens of one step. Row 0 is zero. A row is the sum of all additions of
one request at one block in one phase, so a token costs one row lookup per steered block, however
many vectors its request names.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vectors.store import Library
from vectors.types import Phase, SteeringVector
from workbench.engines.vllm.spec import Injection, Resolved

__all__ = ["Scheduled", "StepSteering"]

RECEIPTS_KEPT = 20_000
VECTORS_KEPT = 256


@dataclass(frozen=True)
class Scheduled:
    """The positions `[start, start + count)` of one request in one step."""

    request: str
    start: int
    count: int
    prompt_length: int
    steer: str | None
    receipt: str


@dataclass
class _Proof:
    """What was steered of one request so far."""

    seen: int = 0
    cached: int = 0
    prompt: int = 0
    decode: int = 0
    rows: int = 0


@dataclass
class _Plan:
    """Rows and their tokens for one block of the present step."""

    rows_RD: list[Tensor] = field(default_factory=list)
    spans: list[tuple[int, int, int]] = field(default_factory=list)


class StepSteering:
    """Plans each step from what was scheduled, applies it per block, and keeps the receipts.

    Knows nothing of vLLM: the runner adapter feeds it and hooks call `apply`.
    """

    def __init__(self, library: Library, width: int, blocks: int) -> None:
        self.width = width
        self.blocks = blocks
        self._library = library
        self._vectors: OrderedDict[str, SteeringVector] = OrderedDict()
        self._resolved: OrderedDict[str, Resolved] = OrderedDict()
        self._plans: dict[int, tuple[Tensor, Tensor]] = {}
        self._pending: list[tuple[str, str, Phase, int, int, set[int]]] = []
        self._fired: set[int] = set()
        self._proofs: OrderedDict[str, dict[str, _Proof]] = OrderedDict()

    def plan(
        self, scheduled: Sequence[Scheduled], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Set up the step that is about to run."""
        self._commit()
        plans: dict[int, _Plan] = {}
        offset = 0
        for item in scheduled:
            if item.steer:
                self._plan_request(item, offset, plans)
            offset += item.count
        self._plans = {}
        for block, plan in plans.items():
            row_of_token_T = torch.zeros(offset, dtype=torch.long)
            for row, first, last in plan.spans:
                row_of_token_T[first:last] = row
            rows = torch.stack([torch.zeros(self.width), *plan.rows_RD])
            self._plans[block] = (rows.to(device, dtype), row_of_token_T.to(device))

    def _plan_request(self, item: Scheduled, offset: int, plans: dict[int, _Plan]) -> None:
        resolved = self._resolve(item.steer or "[]")
        end = item.start + item.count
        boundary = min(max(item.prompt_length, item.start), end)
        for phase, first, last in (
            (Phase.PROMPT, item.start, boundary),
            (Phase.DECODE, boundary, end),
        ):
            by_block: dict[int, list[Injection]] = {}
            for injection in resolved.at(phase):
                by_block.setdefault(injection.block, []).append(injection)
            if first == last or not by_block:
                continue
            for block, injections in by_block.items():
                plan = plans.setdefault(block, _Plan())
                plan.rows_RD.append(self._row(injections))
                span = (offset + first - item.start, offset + last - item.start)
                plan.spans.append((len(plan.rows_RD), *span))
            self._pending.append((item.receipt, item.request, phase, first, last, set(by_block)))
        if item.receipt and resolved.injections:
            proofs = self._proofs.setdefault(item.receipt, {})
            if item.request not in proofs:
                # Positions before the first scheduled one come from the prefix cache, which only
                # requests with the same salt share: they were steered when they were computed.
                proofs[item.request] = _Proof(seen=item.start, cached=item.start)

    def _row(self, injections: Sequence[Injection]) -> Tensor:
        row_D = torch.zeros(self.width)
        for injection in injections:
            row_D += self._vector(injection.vector).addition(injection.block, injection.dose)
        return row_D

    def _vector(self, digest: str) -> SteeringVector:
        if digest not in self._vectors:
            self._vectors[digest] = self._library.vector_by_digest(digest)
            if len(self._vectors) > VECTORS_KEPT:
                self._vectors.popitem(last=False)
        self._vectors.move_to_end(digest)
        return self._vectors[digest]

    def _resolve(self, text: str) -> Resolved:
        if text not in self._resolved:
            self._resolved[text] = Resolved.from_json(text)
            if len(self._resolved) > VECTORS_KEPT:
                self._resolved.popitem(last=False)
        return self._resolved[text]

    def apply(self, block: int, stream_TD: Tensor) -> Tensor:
        """Return the residual stream of block `block` with this step's rows added, `[T, D]`."""
        plan = self._plans.get(block)
        if plan is None:
            return stream_TD
        rows_RD, row_of_token_T = plan
        self._fired.add(block)
        steered = stream_TD.clone()
        steered[: row_of_token_T.shape[0]] += rows_RD[row_of_token_T]
        return steered

    def _commit(self) -> None:
        """Credit the positions of the last step, if every block of theirs really ran."""
        for receipt, request, phase, first, last, blocks in self._pending:
            if not receipt or not blocks <= self._fired:
                continue
            proof = self._proofs.get(receipt, {}).get(request)
            if proof is None:
                continue
            # After a preemption positions are computed again; they count once.
            new = max(0, last - max(first, proof.seen))
            proof.seen = max(proof.seen, last)
            proof.rows = max(proof.rows, len(blocks))
            if phase is Phase.PROMPT:
                proof.prompt += new
            else:
                proof.decode += new
        self._pending.clear()
        self._fired.clear()
        self._plans = {}
        while len(self._proofs) > RECEIPTS_KEPT:
            self._proofs.popitem(last=False)

    def receipt(self, receipt: str) -> dict[str, int]:
        """Take the receipt: how many requests it covers and the distinct positions per phase."""
        self._commit()
        proofs = list(self._proofs.pop(receipt, {}).values())
        least = min((p.prompt + p.decode + p.cached for p in proofs), default=0)
        return {
            "requests": len(proofs),
            "prompt": sum(p.prompt for p in proofs),
            "decode": sum(p.decode for p in proofs),
            "cached": sum(p.cached for p in proofs),
            "rows": max((p.rows for p in proofs), default=0),
            "least": least,
        }
