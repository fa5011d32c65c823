"""A model's elementwise work compiled into few kernels, for steps that are recorded.

Recorded launches cost no time of the processor, but each still reads and writes its tensors: a
Gated-DeltaNet layer as transformers has it makes some two hundred of them, forward and backward.
Decoder layers that `halves` knows are compiled in two halves each; of others, norms, MLPs, rotary
embeddings, and what surrounds the delta rule on a frozen state. Matrix products stay what they were.

Shape letters: B rows, T positions, H value heads, K and E widths of a query-key and of a value head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import torch
from steer_kernels.gdn import gated_delta_rule
from torch import Tensor, nn

from workbench.train.halves import (
    DELTA,
    ROTARY,
    convolved,
    delta_inputs,
    delta_output,
    has_halves,
    run_halves,
)
from workbench.train.joined import JoinedWeights
from workbench.train.kernels import MARK

__all__ = ["fused"]

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


@contextmanager
def fused(
    model: nn.Module, compiled: Compile = _compiled, joined: JoinedWeights | None = None
) -> Iterator[None]:
    """Let `model` run compiled parts inside the `with`; its parameters and results stay the same.

    The first call of each shape compiles, which takes seconds. Sums are taken in float32 where
    transformers rounds in between, so that results differ by rounding.

    Args:
        compiled: what makes a function fast; each function is handed to it again and again.
        joined: matrices of this model to use in place of several; gradients go to them.
    """
    settings: Any = torch._dynamo.config
    with ExitStack() as stack:
        # Every width of a norm and every shape of a step is compiled for itself.
        stack.enter_context(settings.patch(recompile_limit=128))
        layers = [module for module in model.modules() if has_halves(module)]
        known = {module for layer in layers for module in layer.modules()}
        for layer in layers:
            _replace(stack, layer, partial(run_halves, layer, layer.forward, compiled, joined))
        for module in model.modules():
            kind = type(module)
            if module in known:
                continue
            if kind.__name__.endswith(("RMSNorm", "MLP")):
                _replace(stack, module, partial(compiled(kind.forward), module))
            elif all(isinstance(getattr(module, name, None), nn.Module) for name in DELTA):
                _replace(stack, module, partial(_delta, module, module.forward, compiled))
        for code in {sys.modules[type(module).__module__] for module in model.modules()}:
            if hasattr(code, ROTARY) and not layers:
                plain = getattr(code, ROTARY)
                setattr(code, ROTARY, compiled(plain))
                stack.callback(setattr, code, ROTARY, plain)
        yield


def _replace(stack: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    vars(module)["forward"] = forward
    stack.callback(vars(module).pop, "forward")


def _delta(
    module: Any,
    plain: Callable[..., Tensor],
    compiled: Compile,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """A Gated-DeltaNet layer on a frozen state; on anything else, as transformers has it."""
    layer = cache_params.layers[module.layer_idx] if cache_params is not None else None
    state_BHKE: Tensor | None = getattr(layer, "recurrent_states", {}).get(0)
    if state_BHKE is None or not hasattr(state_BHKE, MARK):
        return plain(
            hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs
        )
    assert layer is not None
    joint, g, beta, z, _ = compiled(delta_inputs)(module, hidden_states, attention_mask)
    q, k, v = convolved(module, joint, layer.conv_states[0])
    out_BTHE = gated_delta_rule(q, k, v, g, beta, state_BHKE, normalise=True)
    return compiled(delta_output)(module, out_BTHE, z)
