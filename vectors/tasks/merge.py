"""Merging task vectors that are in memory, by any method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vectors.errors import InputError, ShapeMismatch
from vectors.tasks.registry import Method, method_named
from vectors.tasks.stack import Stack, stacked

__all__ = ["apply", "check_count", "merge"]

NONE: Mapping[str, Any] = {}


def merge(
    method: str,
    terms: Mapping[str, tuple[float, Mapping[str, Tensor]]],
    options: Mapping[str, Any] = NONE,
) -> dict[str, Tensor]:
    """Return the merged deltas, fp32, of all tensors that a term names.

    Terms of weight 0 are left out: a term that is removed was never there. A tensor that a term
    lacks is one that it does not change.

    Args:
        terms: by key, the weight and the deltas by tensor name. Sums go in the order of the keys.

    Raises:
        NameNotFound: no such method.
        InputError: options or a number of terms that the method cannot use, or values not finite.
        ShapeMismatch: terms whose tensors have different shapes.
    """
    row = method_named(method)
    parameters = row.read(options)
    terms = {key: term for key, term in terms.items() if term[0] != 0}
    check_count(row, len(terms))
    weights = {key: weight for key, (weight, _) in terms.items()}
    names = sorted({name for _, deltas in terms.values() for name in deltas})

    def stacks() -> Iterator[Stack]:
        for name in names:
            there = {key: deltas[name] for key, (_, deltas) in terms.items() if name in deltas}
            blank = torch.zeros(next(iter(there.values())).shape)
            yield stacked(name, {key: there.get(key, blank) for key in terms}, weights)

    survey = row.survey(stacks, parameters) if row.survey is not None and names else None
    merged: dict[str, Tensor] = {}
    for stack in stacks():
        known = Stack(stack.name, stack.keys, stack.weights, stack.deltas, survey)
        merged[stack.name] = row.merge(known, parameters)
    return merged


def check_count(method: Method, count: int) -> None:
    """Raise InputError where `count` terms are too few for the method; none at all are the base."""
    if 0 < count < method.least:
        raise InputError(
            f"The method '{method.name}' needs at least {method.least} task vectors, not {count}; "
            "add one, or use linear."
        )


def apply(base: Tensor, tuned: Tensor | None, stack: Stack, merged: Tensor) -> Tensor:
    """Return `base + merged`, rounded once to the base's dtype.

    Elements that do not move keep their bits, and where the only term comes out as it went in, so
    do its own.

    Args:
        tuned: the tuned tensor, where the recipe has one term alone.
    """
    if base.shape != merged.shape:
        raise ShapeMismatch(
            f"The merged delta of '{stack.name}' is {list(merged.shape)} and the base's tensor "
            f"{list(base.shape)}; merge vectors of this base."
        )
    out = torch.where(merged == 0, base, (base.float() + merged).to(base.dtype))
    if tuned is not None:
        out = torch.where((merged == stack.deltas[0]) & (merged != 0), tuned, out)
    return out
