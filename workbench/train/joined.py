"""Matrices that read the same input as one: one product where there were several.

With the few tokens of a decision, the products of a layer's small matrices leave most of a GPU idle.
The parameters stay what they are, and become rows of the joined matrix. For few tokens the gradient
`G = dY^T X` need not be formed either: a probe, which is added to a product in thought only, gets dY
as its gradient, and X is kept.

Shape letters: B rows, T positions, D = B T, M rows of all matrices of a group, N columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.train.factored import Factors

__all__ = ["GROUPS", "Group", "JoinedWeights", "Way", "products"]

GROUPS = (
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("out_proj",),
    ("o_proj",),
    ("down_proj",),
)
"""Linear modules of one parent that read the same input."""


class Way(NamedTuple):
    """How to multiply by a group: its matrix `[M, N]`, and a probe `[B, T, M]` for factors."""

    weight: Tensor
    probe: Tensor | None = None


@dataclass(eq=False)
class Group:
    """A joined matrix `[M, N]`, a leaf that asks for a gradient, and the parameters in it."""

    weight: Tensor
    owned: list[nn.Parameter]
    probe: Tensor | None = None
    input: Tensor | None = None

    def factors(self) -> Factors | None:
        """X `[D, N]` and dY `[D, M]` of the last backward pass through the probe."""
        if self.probe is None or self.probe.grad is None or self.input is None:
            return None
        return Factors([self.input.flatten(0, -2)], [self.probe.grad.flatten(0, -2)])


class JoinedWeights:
    """Joins the groups of a model whose matrices all learn, have no bias and are nobody else's.

    Args:
        parameters: those that learn. Their data moves into the joined matrices, and out of those that
            an earlier one made: the last of a model is the one to use.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        self.groups: dict[tuple[nn.Module, tuple[str, ...]], Group] = {}
        free = {id(parameter) for parameter in parameters} - _shared(model)
        for module in model.modules():
            for names in GROUPS:
                members = [getattr(module, name, None) for name in names]
                if all(type(m) is nn.Linear and m.bias is None for m in members):
                    owned = [m.weight for m in members if m is not None]
                    if all(id(weight) in free for weight in owned):
                        self.groups[module, names] = Group(_join(owned), owned)

    def way(self, module: nn.Module, names: tuple[str, ...]) -> Way | None:
        """How to multiply by the named matrices of a module; None where they are not joined."""
        group = self.groups.get((module, names))
        return Way(group.weight, group.probe) if group is not None else None

    def keep(self, module: nn.Module, names: tuple[str, ...], x: Tensor) -> None:
        """Note what the named matrices have read, where their gradient stays as factors."""
        group = self.groups.get((module, names))
        if group is not None and group.probe is not None:
            group.input = x

    def begin(self, rows: int, width: int, factored: Iterable[Group] = ()) -> None:
        """Forget the last pass; in the next one, these groups keep factors of `rows x width`."""
        for group in self.groups.values():
            group.weight.grad = group.probe = group.input = None
        for group in factored:
            probe = group.weight.new_empty(1).expand(rows, width, len(group.weight))
            group.probe = probe.requires_grad_()

    def hand_out(
        self, factored: Callable[[nn.Parameter], bool] = lambda parameter: True
    ) -> dict[nn.Parameter, Tensor | Factors]:
        """Return each joined parameter's gradient: rows of a formed one, or factors.

        Args:
            factored: whether a parameter may have factors; it gets a formed gradient otherwise.
        """
        found: dict[nn.Parameter, Tensor | Factors] = {}
        for group in self.groups.values():
            sizes = [len(weight) for weight in group.owned]
            if group.weight.grad is not None:
                found.update(zip(group.owned, group.weight.grad.split(sizes), strict=True))
            elif (factors := group.factors()) is not None:
                x_DN, dy_DM = factors.joined()
                pairs = zip(group.owned, dy_DM.split(sizes, 1), strict=True)
                for keep, some in groupby(pairs, lambda pair: factored(pair[0])):
                    weights, grads = zip(*some, strict=True)
                    if keep:
                        found.update(
                            (w, Factors([x_DN], [dy])) for w, dy in zip(weights, grads, strict=True)
                        )
                    else:
                        formed = torch.cat(grads, 1).T @ x_DN
                        rows = formed.split([len(weight) for weight in weights])
                        found.update(zip(weights, rows, strict=True))
        return found


def products(
    module: Any, names: tuple[str, ...], x_BTN: Tensor, way: Way | None
) -> tuple[Tensor, ...]:
    """What the named matrices make of `x_BTN`, each `[B, T, m]`."""
    members = [getattr(module, name) for name in names]
    if way is None:
        return tuple(member(x_BTN) for member in members)
    if way.probe is None:
        y_BTM = F.linear(x_BTN, way.weight)
    else:
        y_BTM: Any = _Probed.apply(x_BTN, way.weight.detach(), way.probe)
    return y_BTM.split([member.out_features for member in members], -1)


class _Probed(torch.autograd.Function):
    """`y = x W^T + probe` with a probe of zeros, which is never read."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, probe: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        return dy @ weight, None, dy


def _join(owned: list[nn.Parameter]) -> Tensor:
    if len(owned) == 1:
        return owned[0].detach().requires_grad_()
    matrix_MN = torch.cat([weight.detach() for weight in owned])
    for weight, rows in zip(owned, matrix_MN.split([len(w) for w in owned]), strict=True):
        weight.data = rows
    return matrix_MN.requires_grad_()


def _shared(model: nn.Module) -> set[int]:
    """Parameters that more than one module has."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared
