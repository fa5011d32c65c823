"""APOLLO: gradient steps scaled as AdamW would scale them, learnt in a small random space.

Shape letters: M x N a weight matrix, S = min(M, N), R the rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from vectors.errors import InputError
from workbench.train.projection import generator_of
from workbench.train.rounding import stochastic_round
from workbench.train.scaling import adam_direction, channel_scaling

__all__ = ["Apollo"]


class Apollo(torch.optim.Optimizer):
    """APOLLO and APOLLO-Mini (Zhu et al., arXiv:2412.05270, algorithm 1).

    For a matrix G `[M, N]` with M >= N (otherwise transposed), channels being its M rows:

        R_t = G_t P^T                              P [R, N] ~ N(0, 1/R), anew every `refresh` steps
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
    function of (seed, parameter, step), so that the state holds plain tensors and numbers and
    resumes exactly. A step never waits for the device.

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
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take further parameters, with options of their own where the group names them."""
        param_group["first"] = sum(len(group["params"]) for group in self.param_groups)
        super().add_param_group(param_group)
        _check(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"], group["first"]):
                if parameter.grad is not None:
                    self._move(parameter, group, index)
        return loss

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

    def _move(self, parameter: Tensor, group: dict[str, Any], index: int) -> None:
        state = self.state[parameter]
        state["step"] = state.get("step", 0) + 1
        exact = parameter.dtype != torch.bfloat16
        weights = parameter if exact else parameter.float()
        grad = parameter.grad.to(weights.dtype)  # pyright: ignore[reportOptionalMemberAccess]
        decay = 1 - group["lr"] * group["weight_decay"]
        if decay != 1 and not group["compat"]:
            weights.mul_(decay)
        if parameter.ndim == 2 and min(parameter.shape) > group["rank"]:
            key = (group["seed"], index, (state["step"] - 1) // group["refresh"])
            scaling = channel_scaling(grad, state, group, key)
            weights.addcmul_(grad, scaling, value=-group["lr"])
        else:
            weights.sub_(adam_direction(grad, state, group), alpha=group["lr"])
        if decay != 1 and group["compat"]:
            weights.mul_(decay)
        if not exact:
            generator = generator_of(parameter.device, group["seed"], index, state["step"], 1)
            parameter.copy_(stochastic_round(weights, generator))


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
