"""What a merge method works on: the parts that several task vectors have of one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vectors.errors import InputError, ShapeMismatch

__all__ = ["Stack", "Survey", "not_finite", "stacked"]


@dataclass(frozen=True)
class Survey:
    """What a method has to know of the whole model before it can merge one tensor.

    Args:
        cuts: smallest magnitude that each term keeps, in the order of the terms.
        majority: sign (-1, 0, 1) that most elements elected; None if nobody asked.
    """

    cuts: tuple[float, ...]
    majority: int | None = None


@dataclass(frozen=True)
class Stack:
    """The deltas of one tensor, ordered by their keys, so that every sum has one order.

    Args:
        name: the tensor's name.
        keys: which task vector each delta is of; digests, where they come from the library.
        weights: one a delta.
        deltas: fp32, all of the tensor's shape; zeros where a task vector leaves the tensor alone.
        survey: of the whole model; None where the tensor is all that counts.
    """

    name: str
    keys: tuple[str, ...]
    weights: tuple[float, ...]
    deltas: tuple[Tensor, ...]
    survey: Survey | None = None

    def weighted(self) -> tuple[Tensor, ...]:
        """`weight_i * delta_i`, each rounded to fp32 once."""
        return tuple(d * w for d, w in zip(self.deltas, self.weights, strict=True))

    def zeros(self) -> Tensor:
        """A merged delta that changes nothing."""
        return torch.zeros_like(self.deltas[0])


def stacked(
    name: str,
    deltas: Mapping[str, Tensor],
    weights: Mapping[str, float],
    survey: Survey | None = None,
) -> Stack:
    """Return the stack of `deltas`, in the order of their keys.

    Raises:
        InputError: no delta, or values that are not finite.
        ShapeMismatch: shapes that differ.
    """
    keys = tuple(sorted(deltas))
    if not keys:
        raise InputError(f"There is no task vector to merge for '{name}'; give at least one.")
    for key in keys:
        if deltas[key].shape != deltas[keys[0]].shape:
            raise ShapeMismatch(
                f"'{name}' is {list(deltas[key].shape)} in {key[:12]} and "
                f"{list(deltas[keys[0]].shape)} in {keys[0][:12]}; merge vectors of one base."
            )
        if not torch.isfinite(deltas[key]).all():
            raise not_finite(name, key)
    return Stack(
        name,
        keys,
        tuple(weights[key] for key in keys),
        tuple(deltas[key].detach().float() for key in keys),
        survey,
    )


def not_finite(name: str, key: str) -> InputError:
    """The error for a delta that cannot be compared with others."""
    return InputError(
        f"The task vector {key[:12]} moves '{name}' by values that are not finite, which only a "
        "linear recipe can carry; leave it out, or train it again."
    )
