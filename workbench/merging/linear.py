"""The weighted sum of task vectors on a CUDA device: the bits of `vectors.tasks.linear.combine`.

One pass: everything crosses the bus once and nothing stays.

Shape letters: K terms, P elements of a part.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from steer_kernels import merge as kernels

from vectors.errors import ShapeMismatch
from vectors.store.checkpoint import Checkpoint, Slot
from vectors.tasks.delta import raw_bytes
from vectors.tasks.linear import combine
from vectors.tasks.parts import Span, is_float, on_all_cores, spans_of
from vectors.tasks.sources import Reader, Term
from vectors.tasks.streams import write_at
from workbench.merging.crossing import Crossing, on_stream
from workbench.merging.ties import SPAN, THREADS

__all__ = ["DeviceSum"]


class DeviceSum:
    """One weighted sum on `device`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        terms: Sequence[Term],
        weights: Sequence[float],
        device: torch.device,
    ) -> None:
        self.checkpoint, self.terms, self.weights = checkpoint, terms, tuple(weights)
        self._reader, self._device = Reader(checkpoint), device
        self._launching = threading.Lock()
        slots = [slot for file in checkpoint.files for slot in file.slots if self._sums(slot)]
        spans = spans_of(slots, whole=any(term.whole for term in terms), most=SPAN)
        self.crossing = Crossing(spans, self._reader, terms, device, "none")
        self._spans = spans

    def write(self, folder: Path) -> Iterator[str]:
        """Sum every tensor into the files in `folder`; yield each tensor's name."""
        with self._reader:
            for file in self.checkpoint.files:
                with (folder / file.path.name).open("xb", buffering=0) as out:
                    out.write(file.header)
                    for slot in file.slots:
                        if not self._sums(slot):
                            self._plainly(slot, out.fileno())
                            yield slot.name
                    mine = {slot.name for slot in file.slots}
                    spans = [span for span in self._spans if span.slot.name in mine]
                    left = Counter(span.slot.name for span in spans)

                    def work(span: Span, target: int = out.fileno()) -> None:
                        self._sum(span, target)

                    for span, _ in on_all_cores(work, spans, THREADS):
                        left[span.slot.name] -= 1
                        if not left[span.slot.name]:
                            yield span.slot.name

    def _sums(self, slot: Slot) -> bool:
        """Whether the tensor has to be computed: not where one term of weight 1 is the result."""
        weights = [self.weights[k] for k in self._changing(slot.name)]
        return is_float(slot) and bool(weights) and weights != [1.0]

    def _changing(self, name: str) -> list[int]:
        return [k for k, term in enumerate(self.terms) if term.changes(name)]

    def _plainly(self, slot: Slot, out: int) -> None:
        changing = [(self.weights[k], self.terms[k]) for k in self._changing(slot.name)]
        if not changing:
            raw: bytes | bytearray = self.checkpoint.read(slot.name)
        else:
            base = self.checkpoint[slot.name]
            try:
                raw = raw_bytes(
                    combine(base, [(w, t.tensor(slot.name, base)) for w, t in changing])
                )
            except ShapeMismatch as error:
                raise ShapeMismatch(f"'{slot.name}': {error}") from error
        write_at(out, np.frombuffer(raw, np.uint8), slot.start)

    def _sum(self, span: Span, out: int) -> None:
        rows = self._changing(span.slot.name)
        weights = torch.tensor([self.weights[k] for k in rows])
        with on_stream(self.crossing.work):
            weights_K = weights.to(self._device)
        for part in self.crossing.parts(span, rows):
            with self._launching, on_stream(self.crossing.work):
                # Rows that were not asked for hold anything.
                tuned_KP = part.tuned_KP if len(rows) == len(self.terms) else part.tuned_KP[rows]
                kernels.combine(part.base_P, tuned_KP, weights_K, tuned_KP[0])
            first = span.slot.start + 2 * part.start
            self.crossing.fetch(tuned_KP[0], lambda at, raw, f=first: write_at(out, raw, f + at))
