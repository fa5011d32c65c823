"""Gradients of Linear layers kept as two thin factors and never formed.

A Linear layer's weight gradient is `G = dY^T X` over D tokens. Where D is far smaller than the
matrix, X `[D, N]` and dY `[D, M]` are a small share of G `[M, N]`, and APOLLO needs nothing else
(`workbench.train.apollo_steps.factored_step`).

Shape letters: M x N a weight, D tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "Factors",
    "clip_grad_norm",
    "clip_gradients",
    "drop_factors",
    "factored_linears",
    "factors_of",
    "keep_factors",
    "linear",
]

NAME = "workbench_factors"
FOREACH: Any = torch
"""PyTorch's functions over lists of tensors, which it keeps private and its optimizers use."""


@dataclass
class Factors:
    """The factors of one weight's gradient, a pair for each use of the layer since the last step."""

    inputs: list[Tensor] = field(default_factory=list)
    output_grads: list[Tensor] = field(default_factory=list)

    def joined(self) -> tuple[Tensor, Tensor]:
        """Return X `[D, N]` and dY `[D, M]` over all uses, whose gradients add up."""
        if len(self.inputs) > 1:
            self.inputs = [torch.cat(self.inputs)]
            self.output_grads = [torch.cat(self.output_grads)]
        return self.inputs[0], self.output_grads[0]

    def dense(self) -> Tensor:
        """Return the gradient itself, `dY^T X`, in the factors' dtype."""
        x_DN, dy_DM = self.joined()
        return dy_DM.T @ x_DN

    def square(self) -> Tensor:
        """Return `||G||^2 = <X X^T, dY dY^T>`, a float32 scalar, without forming G."""
        x_DN, dy_DM = (factor.to(_accurate(factor.dtype)) for factor in self.joined())
        return ((x_DN @ x_DN.T) * (dy_DM @ dy_DM.T)).sum().clamp_min(0)


def factors_of(weight: Tensor) -> Factors | None:
    """Return the factors that backward has left for `weight`, if any."""
    return getattr(weight, NAME, None)


def keep_factors(weight: Tensor, factors: Factors) -> None:
    """Leave the gradient of `weight` as factors."""
    setattr(weight, NAME, factors)


def drop_factors(weight: Tensor) -> None:
    """Forget them, as `zero_grad` forgets a gradient."""
    if hasattr(weight, NAME):
        delattr(weight, NAME)


class _Linear(torch.autograd.Function):
    """`y = x W^T`, whose backward gives dx and leaves (x, dy) with the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x)
        ctx.weight = weight
        return functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        weight = ctx.weight
        factors = factors_of(weight)
        if factors is None:
            factors = Factors()
            keep_factors(weight, factors)
        factors.inputs.append(x.detach().reshape(-1, x.shape[-1]))
        factors.output_grads.append(dy.detach().reshape(-1, dy.shape[-1]))
        return (dy @ weight if ctx.needs_input_grad[0] else None), None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `torch.nn.functional.linear(x, weight, bias)`, equal to it forward and backward,
    except that backward leaves the weight's gradient as factors (`factors_of(weight)`).

    The weight must not move between forward and backward, and has no second derivative.
    """
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return functional.linear(x, weight, bias)
    # Flat, because the rows of X and dY are kept; a view of what autograd would have saved.
    y = _Linear.apply(x.reshape(-1, x.shape[-1]), weight)
    y = y.view(*x.shape[:-1], -1)  # pyright: ignore[reportOptionalMemberAccess]
    return y if bias is None else y + bias


@contextmanager
def factored_linears(model: nn.Module, rank: int = 256) -> Iterator[list[str]]:
    """Let a model's Linear layers keep factors, inside the `with`; yields their weights' names.

    Taken are plain `nn.Linear` modules whose weight learns and which APOLLO projects: its smaller
    side is above `rank`. Two uses of one weight add up; a weight that an embedding shares is left
    alone.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    names, modules = [], []
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or "forward" in vars(module):
            continue
        weight = module.weight
        if weight.requires_grad and owners[id(weight)] == 1 and min(weight.shape) > rank:
            names.append(f"{name}.weight" if name else "weight")
            modules.append(module)
            module.forward = partial(_forward, module)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield names
    finally:
        for module in modules:
            del module.forward


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], most: float) -> Tensor:
    """Shrink all gradients, formed or factored, to a norm of at most `most` over all of them.

    The same as `torch.nn.utils.clip_grad_norm_`, without waiting for the device.

    Returns:
        The norm before, a scalar tensor.
    """
    grads, factors = [], []
    for parameter in parameters:
        if parameter.grad is not None:
            grads.append(parameter.grad)
        if (kept := factors_of(parameter)) is not None:
            factors.append(kept)
    if not grads and not factors:
        return torch.zeros(())
    squares = [kept.square() for kept in factors]
    return clip_gradients(grads, factors, most, torch.stack(squares) if squares else None)


@torch.no_grad()
def clip_gradients(
    gradients: Sequence[Tensor], factors: Sequence[Factors], most: float, squares: Tensor | None
) -> Tensor:
    """Shrink formed and factored gradients together, at least one; return the norm before.

    Args:
        squares: squared norms of the factored ones, in any order.
    """
    parts = []
    if gradients:
        # In the gradients' own dtype, a norm would have three digits.
        accurate = _accurate(gradients[0].dtype)
        norms = FOREACH._foreach_norm(list(gradients), 2, dtype=accurate)
        parts.append(torch.stack(norms).square().sum())
    if squares is not None:
        parts.append(squares.sum())
    norm = torch.stack([part.float() for part in parts]).sum().sqrt()
    shrunk = [*gradients, *(kept.joined()[1] for kept in factors)]
    FOREACH._foreach_mul_(shrunk, (most / (norm + 1e-6)).clamp_max(1.0))
    return norm


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
