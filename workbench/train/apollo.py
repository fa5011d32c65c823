"""APOLLO: gradient steps scaled as AdamW would scale them, learnt in a small random space.

Shape letters: M x N a weight matrix, S = min(M, N), R the rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vectors.errors import InputError
from workbench.train.apollo_kernels import steps_for
from workbench.train.apollo_steps import make_dials
from workbench.train.factored import drop_factors, factors_of
from workbench.train.projection import key_of, projection

__all__ = ["Apollo"]


class Apollo(torch.optim.Optimizer):
    """APOLLO and APOLLO-Mini (Zhu et al., arXiv:2412.05270, algorithm 1).

    For a matrix G `[M, N]` with M >= N (otherwise transposed), channels being its M rows:

        R_t = G_t P^T                              P [R, N] = +-1/sqrt(R), anew every `refresh` steps
        m_t = b1 m + (1 - b1) R_t,   v_t = b2 v + (1 - b2) R_t^2
        Q_t = m^ / (sqrt(v^) + eps)                m^, v^ corrected for bias
        s_j = ||Q_t[j]|| / ||R_t[j]||              one for each channel; "tensor": one in all
        U_t = alpha s G_t                          alpha = sqrt(S / R)
        U_t is cut to `limiter` times ||U_t-1||    where it grew faster
        W   = (1 - lr wd) W - lr U_t

    The norms of Q are those of AdamW's step times sqrt(R / S), which alpha undoes; `lr` therefore
    means what it means for AdamW. Parameters that are not matrices, and matrices with S <= R, take
    AdamW's step itself.

    Moments are float32 `[M, R]`. bfloat16 weights are rounded stochastically. All randomness is a
    function of (seed, parameter, step, element), so that the state holds plain tensors and numbers
    and resumes exactly. P is of signs, which all matrices share, where the paper draws Gaussian
    numbers (`workbench.train.projection`). A step never waits for the device. On CUDA it takes a
    few launches for all matrices together (`steer_kernels.apollo`); a gradient that
    `workbench.train.factored` keeps as factors is never formed.

    Args:
        params: parameters, or groups of them; a group may set every option of its own.
        lr: learning rate; 1e-5 to 1e-4 for fine-tuning.
        rank: R.
        scaling: "channel" (APOLLO) or "tensor" (APOLLO-Mini, with rank 1).
        scale: alpha, or "auto" for sqrt(S / R). The public code's `scale` is alpha squared.
        refresh: steps between projections.
        limiter: largest growth of an update's norm from one step to the next; None for no limit.
        betas, eps, weight_decay: as in AdamW; the decay is decoupled.
        seed: of projections and rounding.
        compat: "apollo-torch" follows the trajectory of the public code, which leaves m and v
            uncorrected, corrects by `sqrt(1 - b2^t) / (1 - b1^t)` after the limiter, and decays
            the updated weights. Its random numbers are still ours.

    Raises:
        InputError: an option out of range, or weights that are neither float32, float64 nor
            bfloat16.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 5e-5,
        *,
        rank: int = 256,
        scaling: Literal["channel", "tensor"] = "channel",
        scale: float | Literal["auto"] = "auto",
        refresh: int = 200,
        limiter: float | None = 1.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
        compat: Literal["apollo-torch"] | None = None,
    ) -> None:
        options = {
            "lr": lr,
            "rank": rank,
            "scaling": scaling,
            "scale": scale,
            "refresh": refresh,
            "limiter": limiter,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "seed": seed,
            "compat": compat,
        }
        self._kept: dict[tuple[Any, ...], Tensor] = {}
        self._made_of: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take further parameters, with options of their own where the group names them."""
        param_group["first"] = sum(len(group["params"]) for group in self.param_groups)
        super().add_param_group(param_group)
        _check(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move every parameter that has a gradient, formed or factored."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for call in self.prepare():
            call()
        return loss

    def prepare(self) -> list[Callable[[], None]]:
        """Count a step, write its numbers to the device, and return the calls that take it.

        `step` is this and the calls. The calls can be captured in a CUDA graph; before each replay
        `prepare` writes the next step's numbers to where the graph reads them, as long as the
        gradients stay where they are.
        """
        calls = []
        for place, group in enumerate(self.param_groups):
            buckets: dict[tuple[Any, ...], list[_Member]] = {}
            for index, parameter in enumerate(group["params"], group["first"]):
                member = self._member(parameter, group, index)
                if member is not None:
                    step = self.state[parameter]["step"]
                    kind = (step, parameter.device, parameter.dtype, member.how)
                    buckets.setdefault(kind, []).append(member)
            for slot, ((step, device, dtype, how), members) in enumerate(buckets.items()):
                calls.append(self._call(group, (place, slot), step, device, dtype, how, members))
        return calls

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients and factors."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for parameter in group["params"]:
                drop_factors(parameter)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; moments keep their own dtype."""
        super().load_state_dict(state_dict)
        # torch casts every state to its parameter's dtype, and bfloat16 moments would never decay.
        parameters = [p for group in self.param_groups for p in group["params"]]
        names = [i for group in state_dict["param_groups"] for i in group["params"]]
        for parameter, name in zip(parameters, names, strict=True):
            for key, value in state_dict["state"].get(name, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][key] = value.to(parameter.device, copy=True)

    def _member(self, parameter: Tensor, group: dict[str, Any], index: int) -> _Member | None:
        """Return what a step needs of one parameter, and count the step; None without gradient."""
        gradient, factors = parameter.grad, factors_of(parameter)
        if gradient is None and factors is None:
            return None
        projected = parameter.ndim == 2 and min(parameter.shape) > group["rank"]
        pair = None
        if factors is not None and projected and gradient is None:
            pair = factors.joined()
        elif factors is not None:
            dense = factors.dense()
            gradient = dense if gradient is None else gradient + dense
        state = self.state[parameter]
        if not state:
            shape = (max(parameter.shape), group["rank"]) if projected else parameter.shape
            options = {"device": parameter.device, "dtype": _accurate(parameter.dtype)}
            state["step"] = 0
            state["exp_avg"] = torch.zeros(shape, **options)
            state["exp_avg_sq"] = torch.zeros(shape, **options)
            if projected:
                state["norm"] = torch.full((), math.inf, **options)
        state["step"] += 1
        how = "adamw" if not projected else "factored" if pair else "dense"
        return _Member(parameter.detach(), gradient, pair, state, key_of(group["seed"], index), how)

    def _call(
        self,
        group: dict[str, Any],
        slot: tuple[int, int],
        step: int,
        device: torch.device,
        dtype: torch.dtype,
        how: str,
        members: list[_Member],
    ) -> Callable[[], None]:
        """Return the call that moves `members`, all of one kind and at one step."""
        turn = key_of(group["seed"], step, 2)
        rule = {
            "scaling": group["scaling"],
            "scale": group["scale"],
            "limiter": group["limiter"],
            "betas": tuple(group["betas"]),
            "eps": group["eps"],
            "compat": group["compat"] is not None,
        }
        dials = make_dials(
            group["lr"], group["weight_decay"], rule["betas"], step, turn, _accurate(dtype)
        )
        dials = self._keep(("dials", *slot, device), dials)
        projected = how != "adamw"
        module = steps_for(members[0].weight, group["rank"] if projected else 1)
        states = [[m.state[name] for m in members] for name in ("exp_avg", "exp_avg_sq")]
        arguments: list[Any] = [[m.weight for m in members]]
        if how == "factored":
            arguments += [[m.pair[side] for m in members if m.pair] for side in (0, 1)]
        else:
            arguments.append([m.gradient for m in members])
        arguments += states
        if projected:
            arguments.append([m.state["norm"] for m in members])
        arguments.append([m.key for m in members])
        if projected:
            arguments.append(self._signs(group, step, device, dtype, slot, members))
        function = getattr(module, f"{how}_step")
        return torch.no_grad()(partial(function, *arguments, dials, **rule))

    def _signs(
        self,
        group: dict[str, Any],
        step: int,
        device: torch.device,
        dtype: torch.dtype,
        slot: tuple[int, int],
        members: list[_Member],
    ) -> Tensor:
        """Return the table of signs of a step, which changes when the projection does."""
        small = max(min(member.weight.shape) for member in members)
        epoch = (step - 1) // group["refresh"]
        name = ("signs", *slot, device)
        made_of = (group["rank"], small, group["seed"], epoch, dtype)
        if self._made_of.get(name) != made_of:
            self._made_of[name] = made_of
            self._keep(name, projection(*made_of[:4], device, dtype))
        return self._kept[name]

    def _keep(self, name: tuple[Any, ...], value: Tensor) -> Tensor:
        """Copy `value` to its own place on the device, where a captured graph finds it again."""
        device, kept = name[-1], self._kept.get(name)
        if kept is None or kept.shape != value.shape or kept.dtype != value.dtype:
            kept = self._kept[name] = torch.empty_like(value, device=device)
        if device.type == "cuda" and not value.is_cuda:
            value = value.pin_memory()  # from pageable memory, the copy would wait
        kept.copy_(value, non_blocking=True)
        return kept


class _Member(NamedTuple):
    """One parameter in one step."""

    weight: Tensor
    gradient: Tensor | None
    pair: tuple[Tensor, Tensor] | None
    state: dict[str, Any]
    key: int
    how: str


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(group: dict[str, Any]) -> None:
    """Refuse options out of range and weights of another kind."""
    beta1, beta2 = group["betas"]
    positive = group["scale"] == "auto" or 0 < group["scale"] < math.inf
    for name, ok, wanted in (
        ("lr", 0 <= group["lr"] < math.inf, "a finite number, at least 0"),
        ("rank", group["rank"] >= 1, "at least 1"),
        ("scaling", group["scaling"] in ("channel", "tensor"), "channel or tensor"),
        ("scale", positive, "auto or a positive number"),
        ("refresh", group["refresh"] >= 1, "at least 1"),
        ("limiter", group["limiter"] is None or group["limiter"] >= 1, "None or at least 1"),
        ("betas", 0 <= beta1 < 1 and 0 <= beta2 < 1, "in [0, 1)"),
        ("eps", group["eps"] > 0, "positive"),
        ("weight_decay", group["weight_decay"] >= 0, "at least 0"),
        ("compat", group["compat"] in (None, "apollo-torch"), "None or apollo-torch"),
    ):
        if not ok:
            raise InputError(f"APOLLO's {name} must be {wanted}, not {group[name]}.")
    for parameter in group["params"]:
        if parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16):
            raise InputError(
                f"APOLLO moves float32 and bfloat16 weights, not {parameter.dtype}; "
                "load the model in one of them."
            )
