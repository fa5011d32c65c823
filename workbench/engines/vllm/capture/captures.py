"""The worker's part of capturing: whose positions go into which row, and what was found, until fetched.

A request has a row while it runs; there are as many as requests can run at once. Each position is
added once: what runs again after a preemption was added before, or the request begins anew with its
sums at zero. When a request ends its sums go to the host, and the row is free.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from vectors.errors import BackendUnavailable, GrammarError, WorkbenchError
from workbench.engines.vllm.capture.spec import (
    CAPTURE,
    CAPTURE_ID,
    FOLLOW_ID,
    Wanted,
    capture_id,
    parse_capture,
)
from workbench.engines.vllm.capture.table import CaptureTable
from workbench.engines.vllm.capture.trace import Trace, Traces
from workbench.engines.vllm.tokens import START, Array, Expand, TokenRows

__all__ = ["Captures"]

KEPT_BYTES = 1 << 28
REFUSALS_KEPT = 1024


@dataclass
class _Capture:
    """One request's: what is wanted of it, from where it was computed, and the sums when it has ended."""

    request: str
    id: str
    wanted: Wanted
    length: int
    computed: int
    slot: int
    row: int
    end: int = 0
    sums_LE: Tensor | None = None
    copied: Any = None
    trace: Trace | None = None
    kept_bytes: int = 0

    @property
    def count(self) -> int:
        """How many positions were added."""
        first, end = self._ends()
        return max(0, min(self.end, end) - max(first, self.computed))

    @property
    def problem(self) -> str:
        """Why the sums are not what was asked for, or nothing."""
        first, end = self._ends()
        if self.trace is not None:
            return self.trace.problem
        if self.wanted.decode:
            if self.count:
                return ""
            return "no generated position was read by the model; ask for at least 2 tokens"
        if self.count == end - first:
            return ""
        return f"{self.count} of {end - first} positions have run; fetch when the reply has come"

    def _ends(self) -> tuple[int, int]:
        if self.wanted.decode:
            return self.length, max(self.length, self.end)
        return self.wanted.first, self.wanted.last + 1


class Captures(TokenRows):
    """Rows, sums and results of one worker."""

    def __init__(self, table: CaptureTable, slots: int, expand: Expand) -> None:
        super().__init__(table.row_of_token_T, slots, expand)
        self.table = table
        self._free_rows = list(range(1, table.sum_LRD.shape[1]))
        self._running: dict[str, _Capture] = {}
        self._kept: OrderedDict[str, _Capture] = OrderedDict()
        # By the server's own names, for as long as they run or are kept.
        self._followed: WeakValueDictionary[str, _Capture] = WeakValueDictionary()
        self._bytes = 0
        self._traces = Traces(table.sum_LRD)
        self._refusals: OrderedDict[str, str] = OrderedDict()

    @property
    def _used(self) -> bool:
        return bool(self._running)

    # -- requests come and go -------------------------------------------------------------------

    def add(
        self,
        request: str,
        extra: Mapping[str, Any] | None,
        length: int,
        computed: int,
        slot: int,
    ) -> str:
        """A request begins; return why it cannot be captured, or nothing."""
        if not extra or CAPTURE not in extra:
            return ""
        try:
            name = capture_id(extra)
            found = parse_capture(extra[CAPTURE]).within(length).check_blocks(self.table.blocks)
            self._check_free(name, request)
            row = self._take_row()
        except WorkbenchError as error:
            return self.refuse(request, extra, str(error))
        self._replace(name)
        if found.decode:
            self._slots_S4[slot] = (0, row, length, 0)
        else:
            self._slots_S4[slot] = (row, 0, found.last + 1, found.first)
        self._begin(_Capture(request, name, found, length, computed, slot, row))
        return ""

    def _take_row(self) -> int:
        if not self._free_rows:
            # Requests that were preempted keep theirs.
            raise BackendUnavailable(
                f"All {self.table.sum_LRD.shape[1] - 1} rows for captures are in use by other "
                "requests; send the request again."
            )
        return self._free_rows.pop()

    def _begin(self, capture: _Capture) -> None:
        self.table.clear(capture.row)
        self._changed = True
        self._running[capture.request] = capture
        self._tell_live()

    def trace(
        self,
        request: str,
        extra: Mapping[str, Any],
        trace: Trace,
        *,
        block: int,
        length: int,
        slot: int,
    ) -> str:
        """Note each generated position of a request at one block; return why not, or nothing."""
        try:
            name = capture_id(extra)
            self._check_free(name, request)
            row = self._take_row()
        except WorkbenchError as error:
            return self.refuse(request, extra, str(error))
        trace.length = length
        before = self._kept.get(name)
        if before is not None and before.request == request and before.trace is not None:
            # It was preempted; what it reads again was noted before.
            trace.go_on(before.trace)
        self._replace(name)
        self._slots_S4[slot] = (0, row, length, trace.end)
        wanted = Wanted(-1, -1, True, block, block)
        capture = _Capture(request, name, wanted, length, 0, slot, row, trace=trace)
        self._begin(capture)
        if isinstance(follow := extra.get(FOLLOW_ID), str):
            self._followed[follow] = capture
        self._traces.add(trace, block, row)
        return ""

    def _before(self) -> None:
        """Note what is traced."""
        self._traces.note()

    def projections(
        self, since: Mapping[str, int], ended: Sequence[str]
    ) -> dict[str, tuple[list[float], str]]:
        """What is known of each trace from its value number `since` on, and what went wrong with it.

        Both name requests as the server does (`FOLLOW_ID`). Nothing is taken, and nobody waits but for
        those whose replies have `ended`: then it is all.
        """
        self._before()
        if ended:
            self._traces.wait()
        found: dict[str, tuple[list[float], str]] = {}
        for name, first in since.items():
            capture = self._followed.get(name)
            if capture is not None and capture.trace is not None:
                found[name] = (capture.trace.values[first:].tolist(), capture.trace.problem)
        return found

    def forget(self, names: Sequence[str]) -> None:
        """Drop what nobody will fetch of requests that the server names so, if they run yet as well."""
        for name in names:
            if (capture := self._followed.pop(name, None)) is None:
                continue
            if self._kept.get(capture.id) is capture:
                self._drop(capture.id)
            capture.id = ""

    def watch(self, request: str, block: int, length: int, slot: int) -> None:
        """Sum the prompt of a request at one block, for `project`; nobody fetches it.

        Raises:
            BackendUnavailable: every row is in use.
        """
        row = self._take_row()
        self._slots_S4[slot] = (row, 0, length, 0)
        wanted = Wanted(0, length - 1, low=block, high=block)
        self._begin(_Capture(request, "", wanted, length, 0, slot, row))

    def project(self, request: str, direction_D: Tensor) -> float:
        """The sum of what is watched along a unit direction, as a share of the sum of its norms."""
        capture = self._running[request]
        block, row = capture.wanted.low, capture.row
        along = torch.dot(self.table.sum_LRD[block, row], direction_D)
        return float(along / self.table.norm_LR[block, row].clamp_min(1e-20))

    def unwatch(self, request: str) -> None:
        """Stop summing, and forget it."""
        if (capture := self._running.get(request)) is not None:
            self._release(capture)

    def _check_free(self, name: str, request: str) -> None:
        if any(c.id == name and c.request != request for c in self._running.values()):
            raise GrammarError(
                f"The '{CAPTURE_ID}' {name} belongs to another request, which still runs; give each "
                "request its own."
            )

    def _replace(self, name: str) -> None:
        """Forget what an earlier request left under an id: a result that nobody fetched, or a refusal."""
        self._drop(name)
        self._refusals.pop(name, None)

    def refuse(self, request: str, extra: Mapping[str, Any], why: str) -> str:
        """Capture nothing of a request, and have a fetch say why; return that."""
        if (capture := self._running.get(request)) is not None:
            self._release(capture)
        self._refusals[str(extra.get(CAPTURE_ID))[:64]] = why
        while len(self._refusals) > REFUSALS_KEPT:
            self._refusals.popitem(last=False)
        return why

    def remove(self, request: str) -> None:
        """A request has ended or was preempted; unknown ones capture nothing."""
        capture = self._running.get(request)
        if capture is None:
            return
        if capture.trace is not None:
            self._traces.note()
        self._release(capture)
        if capture.id:
            self._keep(capture)

    def _keep(self, capture: _Capture) -> None:
        if capture.trace is not None:
            capture.kept_bytes = capture.trace.nbytes
        else:
            sums_LE = self._read(capture)
            capture.sums_LE, capture.copied = sums_LE, None
            if self._device.type == "cuda":
                # The copy runs behind the steps that are on their way; nobody waits for it here.
                capture.sums_LE = torch.empty(sums_LE.shape, pin_memory=True)
                capture.sums_LE.copy_(sums_LE, non_blocking=True)
                capture.copied = torch.cuda.Event()
                capture.copied.record()
            capture.kept_bytes = sums_LE.nbytes
        self._kept[capture.id] = capture
        self._bytes += capture.kept_bytes
        while self._bytes > KEPT_BYTES and len(self._kept) > 1:
            self._drop(next(iter(self._kept)))

    def _read(self, capture: _Capture) -> Tensor:
        """The sums `[L, D + 1]` of the wanted blocks, those of the norms last."""
        blocks = slice(capture.wanted.low, self._high(capture) + 1)
        row = capture.row
        norm_L1 = self.table.norm_LR[blocks, row, None]
        return torch.cat([self.table.sum_LRD[blocks, row], norm_L1], 1)

    def _high(self, capture: _Capture) -> int:
        high = capture.wanted.high
        return self.table.blocks - 1 if high is None else high

    def _drop(self, name: str) -> None:
        if (old := self._kept.pop(name, None)) is not None:
            self._bytes -= old.kept_bytes

    def _tell_live(self) -> None:
        live = self.table.live
        if live is not None:
            live.clear()
            for c in self._running.values():
                live.update(range(c.wanted.low, self._high(c) + 1))

    # -- one step -------------------------------------------------------------------------------

    def place(self, slots_N: Array, starts_N: Array, counts_N: Array) -> None:
        """Set the rows of a step whose batch is known to the host."""
        super().place(slots_N, starts_N, counts_N)
        # The runner that calls this keeps a preempted request: what runs again was added before.
        for capture in self._running.values():
            at = np.flatnonzero(slots_N == capture.slot)
            if len(at):
                end = int(starts_N[at[0]] + counts_N[at[0]])
                self._slots_S4[capture.slot, START] = max(
                    end, int(self._slots_S4[capture.slot, START])
                )

    def ran(self, slots_N: Array, starts_N: Array, counts_N: Array) -> None:
        """Note how far the requests of a step come with it."""
        if not self._running:
            return
        end_of = dict(zip(slots_N.tolist(), (starts_N + counts_N).tolist(), strict=True))
        for capture in self._running.values():
            capture.end = max(capture.end, end_of.get(capture.slot, 0))
            if capture.trace is not None:
                capture.trace.ran = capture.end

    # -- results --------------------------------------------------------------------------------

    def take(self, names: Sequence[str]) -> tuple[bytes, str]:
        """Return and forget what was captured under these ids, or say why one of them is missing.

        The bytes are a safetensors file: for each id `<id>.mean`, `[L, D]` float32, `<id>.norm`, the
        mean norms `[L]`, and `<id>.count`, the number of positions; or of a trace `<id>.projection`, one
        number for each generated position that was read.
        """
        self._before()
        self._traces.wait()
        running = {c.id: c for c in self._running.values() if c.id}
        found: dict[str, _Capture] = {}
        for name in names:
            capture = self._kept.get(name) or running.get(name)
            if capture is None:
                why = self._refusals.pop(name, "it is unknown, was fetched before, or has expired")
                return b"", f"Nothing is captured under '{name}': {why}."
            if problem := capture.problem:
                return b"", f"The capture '{name}' is not complete: {problem}."
            found[name] = capture
        tensors: dict[str, Tensor] = {}
        for name, capture in found.items():
            if capture.trace is not None:
                tensors[f"{name}.projection"] = torch.tensor(capture.trace.values.tolist())
            sums_LE = self._taken(capture)
            if sums_LE is None:
                continue
            mean_LE = sums_LE / capture.count
            tensors[f"{name}.mean"] = mean_LE[:, :-1].contiguous()
            tensors[f"{name}.norm"] = mean_LE[:, -1].contiguous()
            tensors[f"{name}.count"] = torch.tensor(capture.count)
        return save(tensors), ""

    def _taken(self, capture: _Capture) -> Tensor | None:
        """Forget it, and return its sums `[L, D + 1]` on the host; a trace has none."""
        if self._kept.get(capture.id) is capture:
            self._drop(capture.id)
            if capture.copied is not None:
                capture.copied.synchronize()
            return capture.sums_LE
        # The reply has come and the worker has not yet heard that the request has ended.
        sums_LE = None if capture.trace is not None else self._read(capture).cpu()
        self._release(capture)
        return sums_LE

    def _release(self, capture: _Capture) -> None:
        self._running.pop(capture.request)
        self._end(capture)

    def _end(self, capture: _Capture) -> None:
        if capture.trace is not None:
            self._traces.remove(capture.trace)
        self._slots_S4[capture.slot] = 0
        self._changed = True
        # Whoever has the row next clears it behind all that reads it now.
        self._free_rows.append(capture.row)
        self._tell_live()
