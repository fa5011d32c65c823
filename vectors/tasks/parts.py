"""Going through the tensors of a model in parts, on all cores.

Shape letters: K terms, P elements of a part, I bytes of an element.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from vectors.store.checkpoint import DTYPES, Checkpoint, Slot
from vectors.tasks.sources import Bytes, Reader, Term

__all__ = ["Part", "Span", "Walk", "is_float", "on_all_cores", "spans_of"]

PART = 1 << 17  # elements; base, terms and result of a part stay in the processor's cache
SPAN = 1 << 22  # elements that one thread takes at a time

Result = TypeVar("Result")


@dataclass(frozen=True)
class Span:
    """A run of elements of one tensor."""

    slot: Slot
    start: int
    stop: int


@dataclass(frozen=True)
class Part:
    """Bytes of the same elements in the base and in the terms asked for; good until the next."""

    start: int
    base: Bytes
    tuned: np.ndarray  # uint8 [K, P * I]

    def tensor(self, row: int | None, dtype: torch.dtype) -> Tensor:
        """The elements of a term, or of the base, `[P]`."""
        return torch.from_numpy(self.base if row is None else self.tuned[row]).view(dtype)


def is_float(slot: Slot) -> bool:
    """Whether the tensor's elements can be merged: floating point, and any there."""
    known = slot.dtype in DTYPES and DTYPES[slot.dtype].is_floating_point
    return known and slot.end > slot.start


def spans_of(slots: Sequence[Slot], *, whole: bool, most: int | None = None) -> list[Span]:
    """Return the work, the largest first, so that no thread is left with a long last one.

    Args:
        most: elements of a span, unless it must be a whole tensor.
    """
    spans: list[Span] = []
    for slot in slots:
        size = (slot.end - slot.start) // DTYPES[slot.dtype].itemsize
        step = size if whole else (most or SPAN)
        spans += [Span(slot, at, min(at + step, size)) for at in range(0, size, step)]
    return sorted(spans, key=lambda span: span.start - span.stop)


def on_all_cores(
    work: Callable[[Span], Result], spans: Sequence[Span], most: int | None = None
) -> Iterator[tuple[Span, Result]]:
    """Yield each span with what `work` made of it, in the order in which they are done.

    Args:
        most: threads, where each holds much.
    """
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(min(cores, most or cores)) as pool:
        waiting = {pool.submit(work, span): span for span in spans}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        finally:
            # After a failure or a stop, what has not begun must not begin.
            for future in waiting:
                future.cancel()


class Walk:
    """Reads base and terms side by side into buffers that each thread has for itself."""

    def __init__(self, checkpoint: Checkpoint, terms: Sequence[Term]) -> None:
        self.terms = terms
        self.reader = Reader(checkpoint)
        self._own = threading.local()

    def parts(self, span: Span, rows: Sequence[int]) -> Iterator[Part]:
        """Yield the parts of a span, with the terms numbered `rows`."""
        width = DTYPES[span.slot.dtype].itemsize
        name = span.slot.name
        base_I, tuned_I = self._buffers(PART * width, len(rows))
        changing = [k for k in rows if self.terms[k].changes(name)]
        for start in range(span.start, span.stop, PART):
            size = (min(start + PART, span.stop) - start) * width
            base, tuned = base_I[:size], tuned_I[: size * len(rows)].reshape(len(rows), size)
            self.reader.into(name, start * width, base)
            for row, k in enumerate(rows):
                if k in changing:
                    self.terms[k].into(name, start * width, tuned[row])
                else:
                    tuned[row] = base
            yield Part(start, base, tuned)

    def _buffers(self, size: int, rows: int) -> tuple[Bytes, Bytes]:
        held = getattr(self._own, "held", None)
        if held is None or held[0].size < size or held[1].size < size * rows:
            held = np.empty(size, np.uint8), np.empty(size * rows, np.uint8)
            self._own.held = held
        return held
