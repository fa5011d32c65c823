"""A model's elementwise work compiled into few kernels, for steps that are recorded.

Recorded launches cost no time of the processor, but each still reads and writes its tensors: a
Gated-DeltaNet layer as transformers has it makes some two hundred of them, forward and backward.
What is compiled are norms, MLPs, rotary embeddings, and what surrounds the delta rule on a frozen
state; matrix products stay what they were.

Shape letters: B rows, T positions, C channels of the convolution, W its width, H value heads, K and
E widths of a query-key and of a value head.
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
from torch.nn import functional as F

from workbench.train.kernels import MARK

__all__ = ["fused"]

ROTARY = "apply_rotary_pos_emb"
DELTA = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "conv1d", "norm", "out_proj")
"""Modules of the layers that `_delta` knows."""

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


@contextmanager
def fused(model: nn.Module, compiled: Compile = _compiled) -> Iterator[None]:
    """Let `model` run compiled parts inside the `with`; its parameters and results stay the same.

    The first call of each shape compiles, which takes seconds. Sums are taken in float32 where
    transformers rounds in between, so that results differ by rounding.

    Args:
        compiled: what makes a function fast; each function is handed to it again and again.
    """
    settings: Any = torch._dynamo.config
    with ExitStack() as stack:
        # Every width of a norm and every shape of a step is compiled for itself.
        stack.enter_context(settings.patch(recompile_limit=128))
        for module in model.modules():
            kind = type(module)
            if kind.__name__.endswith(("RMSNorm", "MLP")):
                _replace(stack, module, partial(compiled(kind.forward), module))
            elif all(isinstance(getattr(module, name, None), nn.Module) for name in DELTA):
                _replace(stack, module, partial(_delta, module, module.forward, compiled))
        for code in {sys.modules[type(module).__module__] for module in model.modules()}:
            if hasattr(code, ROTARY):
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
    q, k, v, g, beta, z = compiled(_before)(
        module, hidden_states, attention_mask, layer.conv_states[0]
    )
    out_BTHE = gated_delta_rule(q, k, v, g, beta, state_BHKE, normalise=True)
    return compiled(_after)(module, out_BTHE, z)


def _before(module: Any, x: Tensor, mask_BT: Tensor | None, conv_BCW: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys, values, log-decays and betas of the rule, and the gate of its output.

    `mixed_t = silu(sum_w c_w x_(t-W+1+w))`, `g = -exp(A_log) softplus(a + dt_bias)`,
    `beta = sigmoid(b)` (Yang et al., arXiv:2412.06464, section 3).
    """
    if mask_BT is not None:
        x = (x * mask_BT[:, :, None]).to(x.dtype)
    rows, width = x.shape[:2]
    taps_CW = module.conv1d.weight.squeeze(1).float()
    taps = taps_CW.shape[1]
    past = conv_BCW[:, :, conv_BCW.shape[2] - taps + 1 :].transpose(1, 2)
    mixed = torch.cat([past, module.in_proj_qkv(x)], 1).float()
    # Not one sum of a stack: the compiler would write the stack to memory.
    mixed_BTC = mixed[:, :width] * taps_CW[:, 0]
    for w in range(1, taps):
        mixed_BTC = mixed_BTC + mixed[:, w : w + width] * taps_CW[:, w]
    mixed_BTC = F.silu(mixed_BTC).to(x.dtype)
    q, k, v = mixed_BTC.split([module.key_dim, module.key_dim, module.value_dim], 2)
    heads = (rows, width, -1)
    g_BTH = -module.A_log.float().exp() * F.softplus(
        module.in_proj_a(x).float() + module.dt_bias.float()
    )
    return (
        q.reshape(*heads, module.head_k_dim),
        k.reshape(*heads, module.head_k_dim),
        v.reshape(*heads, module.head_v_dim),
        g_BTH,
        module.in_proj_b(x).sigmoid(),
        module.in_proj_z(x),
    )


def _after(module: Any, out_BTHE: Tensor, z: Tensor) -> Tensor:
    """The gated norm of each head, and the output matrix."""
    rows, width, _, wide = out_BTHE.shape
    normed = module.norm(out_BTHE.reshape(-1, wide), z.reshape(-1, wide))
    return module.out_proj(normed.reshape(rows, width, -1))
