"""The election of signs: what TIES does after trimming, and others after dropping."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vectors.tasks.parameters import Electing, Election
from vectors.tasks.stack import Stack

__all__ = ["Rules", "amounts", "elected", "fused", "rules", "total"]


def elected(stack: Stack, options: Election) -> Tensor:
    """Return the sign that each element elects: -1, 1, or 0 where the votes add up to 0.

    `sign(sum_i e_i)`, or `sign(sum_i sign(e_i))`, with `e_i = weight_i * delta_i` or `delta_i`.
    """
    votes = stack.zeros()
    for ballot in _ballots(stack, options):
        votes += ballot if options.vote == "sum" else torch.sign(ballot)
    return torch.sign(votes)


def fused(stack: Stack, options: Election) -> Tensor:
    """Return the elementwise mean (or sum, or largest) of the terms that have the elected sign.

    Terms that are 0 at an element have no part in it.

    Source: Yadav et al., "TIES-Merging" (arXiv:2306.01708), section 4.2, steps 2 and 3.
    """
    sign = elected(stack, options)
    if options.zero_sum == "positive":
        sign = torch.where(sign == 0, 1.0, sign)
    elif options.zero_sum == "majority":
        survey = stack.survey
        asked = None if survey is None else survey.majority
        winner = float(torch.sign(sign.double().sum())) if asked is None else float(asked)
        sign = torch.where(sign == 0, winner, sign)
    merged, divisor = stack.zeros(), stack.zeros()
    shares, fixed = amounts(stack.weights, options)
    for ballot, value, amount in zip(
        _ballots(stack, options), stack.weighted(), shares, strict=True
    ):
        agrees = ballot * sign > 0
        if options.combine == "max":
            merged = torch.where(agrees & (value.abs() > merged.abs()), value, merged)
        else:
            merged += torch.where(agrees, value, 0.0)
            divisor += torch.where(agrees, amount, 0.0)
    if fixed:
        divisor.fill_(fixed)
    if options.combine == "sum":
        merged = torch.where(divisor == 0, 0.0, merged / divisor)
    return merged * options.scale


def amounts(weights: tuple[float, ...], options: Election) -> tuple[tuple[float, ...], float]:
    """Return what each agreeing term adds to the divisor, and the divisor if it is fixed, else 0."""
    match options.divisor:
        case "count":
            return (1.0,) * len(weights), 0.0
        case "weights":
            return tuple(abs(w) for w in weights), 0.0
        case "signed-weights":
            return weights, 0.0
        case "terms":
            return (0.0,) * len(weights), float(len(weights))
        case _:
            return (0.0,) * len(weights), 1.0


class Rules(NamedTuple):
    """An election as compiled loops take it; see `vectors.tasks.fast.fuse_bf16`."""

    ballots_K: np.ndarray
    gains_K: np.ndarray
    amounts_K: np.ndarray
    fixed: np.float32
    by_count: bool
    largest: bool
    winner: np.float32
    scale: np.float32


def rules(weights: tuple[float, ...], options: Election, majority: int | None) -> Rules:
    """Return the rules of an election in which `majority` is the sign that most elements elected."""
    own_K = np.array(weights, np.float32)
    ones_K = np.ones_like(own_K)
    shares, fixed = amounts(weights, options)
    weighted = options.election == "weighted"
    return Rules(
        own_K if weighted else ones_K,
        ones_K if weighted else own_K,
        np.array(shares, np.float32),
        np.float32(fixed),
        options.vote == "count",
        options.combine == "max",
        np.float32(1 if options.zero_sum == "positive" else majority or 0),
        np.float32(options.scale),
    )


def total(stack: Stack, options: Electing) -> Tensor:
    """Return the election's result where one is asked for, else `scale * sum_i w_i * delta_i`."""
    if options.elect:
        return fused(stack, options)
    merged = stack.zeros()
    for value in stack.weighted():
        merged += value
    return merged * options.scale


def _ballots(stack: Stack, options: Election) -> tuple[Tensor, ...]:
    return stack.weighted() if options.election == "weighted" else stack.deltas
