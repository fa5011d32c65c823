"""Weights that share a launch: what moves each, copied where a kernel could not address it, and the
table of their addresses.

All weights of one shape, stride and dtype make a bucket. Its table travels to the device again only
when an address changes, so that a captured CUDA graph can be replayed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["Row", "buckets", "numbers_on", "table_of"]

MOST_TABLES = 256
_tables: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()
_recorded: dict[tuple[Any, ...], Tensor] = {}


class Row:
    """One weight and what moves it; `second` is its gradient, or X where `other` is dY."""

    def __init__(
        self,
        weight: Tensor,
        second: Tensor,
        m: Tensor,
        v: Tensor,
        norm: Tensor | None,
        key: int,
        other: Tensor | None = None,
    ) -> None:
        self.weight, self.second, self.m, self.v = weight, second, m, v
        self.norm, self.key, self.other = norm, key, other
        self.back: list[tuple[Tensor, Tensor]] = []

    def aligned(self) -> Row:
        """Copy what the kernels cannot address; `give_back` returns what they moved."""
        for name in ("weight", "m", "v"):
            tensor = getattr(self, name)
            if tensor.data_ptr() % 16 or (name != "weight" and not tensor.is_contiguous()):
                copy = tensor.clone(memory_format=torch.contiguous_format)
                setattr(self, name, copy)
                self.back.append((tensor, copy))
        for name in ("second", "other"):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tensor.data_ptr() % 16 or (self.other is not None and tensor.stride(-1) != 1):
                setattr(self, name, tensor.clone(memory_format=torch.contiguous_format))
        return self

    def give_back(self) -> None:
        for tensor, copy in reversed(self.back):
            tensor.copy_(copy.view(tensor.shape))

    def numbers(self) -> tuple[int, ...]:
        norm = 0 if self.norm is None else self.norm.data_ptr()
        other = 0 if self.other is None else self.other.data_ptr()
        tensors = (self.weight, self.second, self.m, self.v)
        return (*(tensor.data_ptr() for tensor in tensors), norm, self.key, other)

    def kind(self) -> tuple[Any, ...]:
        parts: list[Any] = []
        for tensor in (self.weight, self.second, self.other):
            if tensor is not None:
                parts += [tuple(tensor.shape), tensor.stride(), tensor.dtype]
        return tuple(parts)


def buckets(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Yield the rows of one kind together, and give back what was copied for them."""
    kinds: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        row.aligned()
        kinds.setdefault(row.kind(), []).append(row)
    for bucket in kinds.values():
        yield bucket
        for row in bucket:
            row.give_back()


def table_of(bucket: list[Row]) -> Tensor:
    """Return a row of `apollo_parts` for each weight of a bucket."""
    return numbers_on(
        tuple(number for row in bucket for number in row.numbers()), bucket[0].weight.device
    )


def numbers_on(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return int64 numbers on the device; the same numbers are sent once."""
    key = (device, numbers)
    if key in _recorded:
        return _recorded[key]
    if key not in _tables:
        found = torch.tensor(numbers, dtype=torch.int64)
        if device.type == "cuda":
            # From pageable memory, the copy would wait.
            found = found.pin_memory().to(device, non_blocking=True)
        _tables[key] = found
        if len(_tables) > MOST_TABLES:
            _tables.popitem(last=False)
    else:
        _tables.move_to_end(key)
    if _recording(device):
        # A graph knows its table by the address alone, and is replayed after others have come.
        _recorded[key] = _tables[key]
    return _tables[key]


def _recording(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
