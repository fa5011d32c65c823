"""Breadcrumbs: leave out the largest changes of a tensor, and the smallest."""

from __future__ import annotations

from dataclasses import replace
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vectors.tasks.election import total
from vectors.tasks.parameters import Electing
from vectors.tasks.stack import Stack
from vectors.tasks.trim import cut, share

__all__ = ["BreadcrumbsParameters", "merge"]


class BreadcrumbsParameters(Electing):
    """How much goes at either end."""

    density: float = Field(0.9, gt=0, le=1, description="Share of a tensor's elements that stays.")
    gamma: float = Field(
        0.01, ge=0, lt=1, description="Share of a tensor's largest elements that is left out."
    )

    @model_validator(mode="after")
    def _leave_something(self) -> Self:
        if self.density + self.gamma > 1:
            raise ValueError(
                f"density {self.density:g} and gamma {self.gamma:g} make more than 1; "
                "take a smaller one"
            )
        return self


def merge(stack: Stack, options: BreadcrumbsParameters) -> Tensor:
    """Return `scale * sum_i w_i m_i d_i`, with `m_i` 1 where `low_i <= |d_i| <= high_i`, else 0.

    Of `n` magnitudes, sorted from the largest, `high` has rank `floor(gamma n) + 1` and `low` is
    `floor(density n) - 1` ranks below it. Equal magnitudes stay together.

    Source: Davari and Belilovsky, "Model Breadcrumbs" (arXiv:2312.06795).
    """
    kept = tuple(_middle(delta, options) if delta.numel() else delta for delta in stack.deltas)
    return total(replace(stack, deltas=kept), options)


def _middle(delta: Tensor, options: BreadcrumbsParameters) -> Tensor:
    first = min(delta.numel(), share(options.gamma, delta.numel()) + 1)
    last = min(delta.numel(), first + max(1, share(options.density, delta.numel())) - 1)
    size = delta.abs()
    stays = (size <= cut(delta, first)) & (size >= cut(delta, last))
    return torch.where(stays, delta, 0.0)
