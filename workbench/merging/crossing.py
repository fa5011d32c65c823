"""Base and task vectors on their way from host memory to a device, and there.

Every thread reads into pinned buffers of its own, which are copied on a stream of their own while
kernels run on another and while the next buffer is filled. What fits on the device stays there, so
that a second pass crosses the bus for nothing again; the rest goes through buffers and crosses once
a pass.

Shape letters: N elements of all tensors, P of a part, K terms, I bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from vectors.errors import InputError
from vectors.tasks.parts import Span
from vectors.tasks.sources import Reader, Term

__all__ = ["Crossing", "Held", "HeldTerm", "Part", "free_bytes", "held_in", "on_stream", "room_for"]

STAGE = 1 << 22  # bytes of a pinned buffer; each thread has two for each direction
RING = 1 << 21  # elements of a row that go through the device's buffers at a time
ALIGN = 128  # elements; kernels read 16 bytes at a time
SLACK = 1 << 30  # bytes left to counts, compiled kernels and everybody else

Held = Literal["all", "base", "none"]


@runtime_checkable
class HeldTerm(Protocol):
    """A term whose tensors are in memory, pinned or on the device, and need no buffer."""

    def held(self, name: str) -> Tensor:
        """The whole tensor."""
        ...


@dataclass(frozen=True)
class Part:
    """The same elements of base and terms on the device, bf16 as int16; good until the next one.

    Args:
        start: which element of the tensor comes first.
        tuned_KP: by the terms' numbers; those that were not asked for hold anything.
    """

    start: int
    base_P: Tensor
    tuned_KP: Tensor


def free_bytes(device: torch.device) -> int:
    """Bytes of the device that are free, or that PyTorch keeps and would give."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def room_for(terms: int, threads: int) -> int:
    """Bytes of a device that a merge takes at least, its counts left out."""
    return 2 * 2 * RING * (terms + 1) * threads + SLACK


def held_in(free: int, elements: int, terms: int, threads: int, *, base: bool = False) -> Held:
    """Return what fits into `free` bytes: base and terms, the base, or neither.

    Args:
        base: whether the base is on the device already.
    """
    own = 0 if base else 2 * elements
    if free >= own + 2 * elements * terms + SLACK:
        return "all"
    return "base" if base or free >= own + room_for(terms, threads) else "none"


class Crossing:
    """One merge's way over the bus.

    Args:
        spans: all that will be asked for, whole tensors or parts of them.
        reader: of the base's files.
        held: what stays on the device.
        base: tensors that are on the device already, by name; none are changed.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        reader: Reader,
        terms: Sequence[Term],
        device: torch.device,
        held: Held,
        base: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.device, self.terms, self.held = device, terms, held
        self._reader, self._base = reader, base
        self._held_terms = [term if isinstance(term, HeldTerm) else None for term in terms]
        self._places, size = _places(spans)
        slots = {span.slot.name: span.slot for span in spans}
        self._sizes = {name: (slot.end - slot.start) // 2 for name, slot in slots.items()}
        cuda = device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if cuda else None
        self.work = torch.cuda.Stream(device) if cuda else None
        self._back = torch.cuda.Stream(device) if cuda else None
        self._own = threading.local()
        self._there: set[tuple[int, Span]] = set()
        self.crossed = 0  # bytes, to the device
        self._lock = threading.Lock()
        self._base_N = self._terms_KN = None
        if held != "none" and base is None:
            self._base_N = torch.empty(size, dtype=torch.int16, device=device)
        if held == "all":
            shape = (len(terms), size)
            self._terms_KN = torch.empty(shape, dtype=torch.int16, device=device)
        for stream in (self._copies, self.work):
            if stream is None:
                continue
            stream.wait_stream(torch.cuda.current_stream(device))
            # From the caller's stream, where PyTorch finds them again for the next merge; they are
            # nobody else's until these streams are done with them.
            for tensor in (self._base_N, self._terms_KN):
                if tensor is not None:
                    tensor.record_stream(stream)

    def parts(self, span: Span, rows: Sequence[int]) -> Iterator[Part]:
        """Yield a span, with the terms numbered `rows`: whole where it stays, else part by part."""
        name = span.slot.name
        if self._terms_KN is not None:
            place = self._places[name] + span.start
            here_KP = self._terms_KN[:, place : place + span.stop - span.start]
            base_P = self._base_part(span, span.start, here_KP[0])
            missing = [k for k in rows if (k, span) not in self._there]
            for k in missing:
                self._bring(k, name, span.start, base_P, here_KP[k])
                self._there.add((k, span))
            # What was there has been waited for.
            if missing:
                self._arrived()
            yield Part(span.start, base_P, here_KP)
            return
        for start in range(span.start, span.stop, RING):
            slot_KP, used = self._slot()
            slot_KP = slot_KP[:, : span.stop - start]
            base_P = self._base_part(span, start, slot_KP[-1])
            for k in rows:
                self._bring(k, name, start, base_P, slot_KP[k])
            self._arrived()
            yield Part(start, base_P, slot_KP[:-1])
            if used is not None:
                used.record(self.work)

    def forget(self, span: Span) -> None:
        """Take a span's terms for gone, because something was written over them."""
        for k in range(len(self.terms)):
            self._there.discard((k, span))

    def tensors_of(self, k: int) -> dict[str, Tensor]:
        """What stands on the device where the tensors of a term came to, by name, flat.

        Raises:
            InputError: terms that do not stay there.
        """
        if self._terms_KN is None:
            raise InputError("These terms do not stay on the device; fetch them part by part.")
        return {
            name: self._terms_KN[k, place : place + self._sizes[name]]
            for name, place in self._places.items()
        }

    def fetch(self, result_P: Tensor, write: Callable[[int, np.ndarray], None]) -> None:
        """Hand what the stream `work` makes of a tensor to `write`, with each part's first byte."""
        if self.work is None or self._back is None:
            write(0, result_P.contiguous().view(torch.uint8).numpy())
            return
        self._back.wait_stream(self.work)
        raw_I = result_P.view(torch.uint8)
        waiting: tuple[int, Tensor, torch.cuda.Event] | None = None
        for start in range(0, len(raw_I), STAGE):
            buffer_I, event = self._buffer("back")
            part_I = buffer_I[: len(raw_I) - start]
            with on_stream(self._back):
                part_I.copy_(raw_I[start : start + STAGE], non_blocking=True)
                event.record(self._back)
            if waiting is not None:
                _hand_over(waiting, write)
            waiting = start, part_I, event
        if waiting is not None:
            _hand_over(waiting, write)

    def _base_part(self, span: Span, start: int, out_P: Tensor) -> Tensor:
        """The base's elements from `start`: where they stay, or else in `out_P`."""
        name, stop = span.slot.name, start + len(out_P)
        if self._base is not None:
            return self._base[name].reshape(-1).view(torch.int16)[start:stop]
        # Spans do not overlap, and each is one thread's until it is done.
        key = -1 - start, span
        if self._base_N is not None:
            place = self._places[name]
            out_P = self._base_N[place + start : place + stop]
        if self._base_N is None or key not in self._there:
            self._send(lambda at, raw: self._reader.into(name, at, raw), 2 * start, out_P)
            self._there.add(key)
        return out_P

    def _bring(self, k: int, name: str, start: int, base_P: Tensor, out_P: Tensor) -> None:
        """Copy a term's elements from `start` to `out_P`."""
        term = self.terms[k]
        own = self._held_terms[k]
        held = None if own is None else own.held(name)
        if not term.changes(name):
            held_P = base_P
        elif held is not None:
            held_P = held.reshape(-1).view(torch.int16)[start : start + len(out_P)]
            self._tell(2 * len(out_P))
        else:
            self._send(lambda at, raw: term.into(name, at, raw), 2 * start, out_P)
            return
        with on_stream(self._copies):
            out_P.copy_(held_P, non_blocking=True)

    def _send(self, fill: Callable[[int, np.ndarray], None], first: int, out_P: Tensor) -> None:
        """Fill pinned buffers one after the other, and copy each while the next is filled."""
        raw_I = out_P.view(torch.uint8)
        if self._copies is None:
            fill(first, raw_I.numpy())
        else:
            for start in range(0, len(raw_I), STAGE):
                buffer_I, event = self._buffer("out")
                part_I = buffer_I[: len(raw_I) - start]
                fill(first + start, part_I.numpy())
                with on_stream(self._copies):
                    raw_I[start : start + STAGE].copy_(part_I, non_blocking=True)
                    event.record(self._copies)
        self._tell(len(raw_I))

    def _tell(self, crossed: int) -> None:
        with self._lock:
            self.crossed += crossed

    def _arrived(self) -> None:
        """Let kernels wait for the copies so far."""
        if self.work is not None and self._copies is not None:
            self.work.wait_stream(self._copies)

    def _buffer(self, way: str) -> tuple[Tensor, torch.cuda.Event]:
        """The pinned buffer of this thread that was used longest ago, once it is free."""
        held = getattr(self._own, way, None)
        if held is None:
            held = [
                (torch.empty(STAGE, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())
                for _ in range(2)
            ]
            setattr(self._own, way, held)
        held.reverse()
        held[0][1].synchronize()
        return held[0]

    def _slot(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """The device buffer of this thread that was used longest ago, once it is free."""
        held = getattr(self._own, "slots", None)
        if held is None:
            shape, cuda = (len(self.terms) + 1, RING), self._copies is not None
            with on_stream(self._copies):
                held = [
                    (
                        torch.empty(shape, dtype=torch.int16, device=self.device),
                        torch.cuda.Event() if cuda else None,
                    )
                    for _ in range(2)
                ]
            for slot_KP, _ in held:
                if self.work is not None:
                    slot_KP.record_stream(self.work)
            self._own.slots = held
        held.reverse()
        slot_KP, used = held[0]
        if used is not None and self._copies is not None:
            self._copies.wait_event(used)
        return slot_KP, used


def on_stream(stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
    """Let what is inside run on the stream, where there is one."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _places(spans: Sequence[Span]) -> tuple[dict[str, int], int]:
    """Where each tensor begins among all, and how many elements there are."""
    places: dict[str, int] = {}
    size = 0
    for slot in {span.slot.name: span.slot for span in spans}.values():
        places[slot.name] = size
        size += -(-(slot.end - slot.start) // 2 // ALIGN) * ALIGN
    return places, size


def _hand_over(
    ready: tuple[int, Tensor, torch.cuda.Event], write: Callable[[int, np.ndarray], None]
) -> None:
    start, part_I, event = ready
    event.synchronize()
    write(start, part_I.numpy())
