"""The client's side of capturing: what it asks to be read, and what it gets.

Letters: L blocks, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workbench.engines.base import Projections

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Captured", "ProjectedStream", "Span", "read_captures", "read_projections"]


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


@dataclass
class ProjectedStream:
    """The projections that have come with the chunks of one reply."""

    values: list[float] = field(default_factory=list)

    def take(self, chunk: Mapping[str, Any]) -> bool:
        """Whether there are more with this chunk."""
        told = (chunk.get("workbench") or {}).get("projections")
        if not told or not told["values"]:
            return False
        del self.values[told["first"] :]
        self.values += [math.nan if value is None else value for value in told["values"]]
        return True

    def projections(self, vector: str, tokens: Sequence[str]) -> Projections:
        """All so far, with the tokens so far; that of a token nobody has seen is left out."""
        return Projections(vector, tuple(tokens), tuple(self.values[: len(tokens)]))
