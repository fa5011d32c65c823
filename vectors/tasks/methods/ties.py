"""TIES: trim small changes, elect a sign for each element, merge the terms that agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from vectors.tasks.election import elected, fused
from vectors.tasks.parameters import Election
from vectors.tasks.stack import Stack, Survey
from vectors.tasks.trim import Rank, cut, keep_largest, rank_of

__all__ = ["TiesParameters", "merge", "survey", "trimmed"]


class TiesParameters(Election):
    """Every choice in which published codes differ."""

    density: float = Field(
        0.2, gt=0, le=1, description="Share of its elements that each task vector keeps."
    )
    scope: Literal["global", "tensor"] = Field(
        "global",
        description="Whether the share is taken of the whole model or of each tensor by itself.",
    )
    rank: Rank = Field(
        "share",
        description="Whether the threshold is the magnitude of rank floor(density * size), or the "
        "one after it, as in the authors' code.",
    )
    tie_rule: Literal[">="] = Field(
        ">=", description="Elements whose magnitude equals the threshold are all kept."
    )


def merge(stack: Stack, options: TiesParameters) -> Tensor:
    """Return the mean of the trimmed deltas that have the elected sign.

    `scale / n * sum_i [sign(w_i d_i) = s] w_i d_i` over the `d_i` with `|d_i| >= cut_i`, with
    `s = sign(sum_i w_i d_i)` and `n` the number of terms in the sum.

    Source: Yadav et al., "TIES-Merging" (arXiv:2306.01708), section 4.2.

    Args:
        stack: with a survey if the scope is global; without, the tensor is taken for the model.
    """
    return fused(trimmed(stack, options), options)


def survey(stacks: Callable[[], Iterable[Stack]], options: TiesParameters) -> Survey | None:
    """Return the cuts over all tensors of a model, all magnitudes in memory at once.

    The plain way, for tests and small models; `vectors.tasks.streams` does it out of core.
    """
    if options.scope == "tensor":
        return None
    columns: list[list[Tensor]] = []
    for stack in stacks():
        columns.append([delta.abs().reshape(-1) for delta in stack.deltas])
    whole = [torch.cat(column) for column in zip(*columns, strict=True)]
    cuts = tuple(cut(x, rank_of(options.density, x.numel(), options.rank)) for x in whole)
    found = Survey(cuts)
    if options.zero_sum != "majority":
        return found
    signs = (elected(trimmed(replace(s, survey=found), options), options) for s in stacks())
    tally = sum(int(sign.double().sum()) for sign in signs)
    return Survey(cuts, (tally > 0) - (tally < 0))


def trimmed(stack: Stack, options: TiesParameters) -> Stack:
    """Return the stack with 0 in place of what is too small to keep."""
    size = stack.deltas[0].numel()
    if not size:
        return stack
    if options.scope == "global" and stack.survey is not None:
        cuts = stack.survey.cuts
    else:
        rank = rank_of(options.density, size, options.rank)
        cuts = tuple(cut(delta, rank) for delta in stack.deltas)
    kept = tuple(keep_largest(d, c) for d, c in zip(stack.deltas, cuts, strict=True))
    return replace(stack, deltas=kept)
