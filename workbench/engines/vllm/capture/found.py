"""The client's side of capturing: what it asks to be read, and what it gets.

Letters: L blocks, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Captured", "Span", "read_captures", "read_projections"]


@dataclass(frozen=True)
class Span:
    """A prompt's token ids, and its positions `first` to `last`, both included."""

    ids: Sequence[int]
    first: int
    last: int


@dataclass(frozen=True)
class Captured:
    """What lies behind each block at a span's positions.

    Args:
        mean_LD: the mean of the residual stream, float32.
        norm_L: the mean of its norms.
        count: how many positions there were.
    """

    mean_LD: Tensor
    norm_L: Tensor
    count: int


def read_captures(data: bytes, names: Sequence[str]) -> list[Captured]:
    """Take apart what the engine sent for these ids."""
    from safetensors.torch import load  # noqa: PLC0415  # talking to an engine needs no torch

    found = load(data)
    return [
        Captured(found[f"{name}.mean"], found[f"{name}.norm"], int(found[f"{name}.count"]))
        for name in names
    ]


def read_projections(data: bytes, name: str) -> list[float]:
    """The projection of each generated position that was read."""
    from safetensors.torch import load  # noqa: PLC0415  # as above

    return load(data)[f"{name}.projection"].tolist()
