"""Kernels in place of transformers' own attention and delta rule, on a frozen context only.

What a frozen layer hands out is marked, on the very tensors that models pass on: the decision's
keys carry the context's keys and values, the state carries that it is constant. Marked tensors go
to `steer_kernels`, all others to what transformers would have called; a checkpointed layer that is
run again in the backward pass finds the same marks.

Shape letters: B rows, G key-value heads, H heads, T decision positions, P context positions, K and
E widths of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from importlib.util import find_spec
from typing import Any

import torch
from steer_kernels.attention import frozen_prefix_attention
from steer_kernels.gdn import gated_delta_rule
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vectors.errors import ModelNotSupported
from workbench.train.cache import FrozenCache
from workbench.train.frozen import FrozenContext

__all__ = ["MARK", "ApartAttention", "attend", "kernels_fit", "read_by_kernels"]

NAME = "frozen_prefix"
RULE = "torch_chunk_gated_delta_rule"
MARK = "_frozen_prefix"
UNKNOWN = ("softcap", "s_aux", "position_bias")


def kernels_fit(model: PreTrainedModel) -> bool:
    """Say whether kernels can read this model's frozen contexts: 16-bit floats, CUDA, sdpa."""
    return (
        model.device.type == "cuda"
        and find_spec("triton") is not None
        and model.dtype in (torch.bfloat16, torch.float16)
        and model.config._attn_implementation in ("sdpa", NAME)
    )


def read_by_kernels(context: FrozenContext) -> FrozenContext:
    """Return the same context, which the model reads by kernels where they run on its device.

    Keys and values of the context are not joined with the decision's, and get no gradient. Layers
    with a sliding window, and attention with a soft cap or sinks, keep transformers' way. Outputs at
    padding differ from transformers', and nothing may be learnt from them either way.

    Raises:
        ModelNotSupported: a model whose attention is not `sdpa`.
    """
    implementation = context.model.config._attn_implementation
    if implementation not in ("sdpa", NAME):
        raise ModelNotSupported(
            f"The kernels stand in for sdpa attention, and this model uses {implementation}; "
            'load it with attn_implementation="sdpa".'
        )
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    context.model.set_attn_implementation(NAME)
    for module in {sys.modules[type(m).__module__] for m in context.model.modules()}:
        rule = getattr(module, RULE, None)
        if rule is not None and not hasattr(rule, MARK):
            setattr(module, RULE, _dispatching(rule))
    cache = object.__new__(FrozenCache)
    vars(cache).update(vars(context.cache))
    cache.layers = [_marked(layer, context.lengths_B) for layer in context.cache.layers]
    return replace(context, cache=cache)


class ApartAttention(DynamicLayer):
    """Hands out the decision's keys and values as they are, marked with the context's."""

    lengths_B: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        marked_BGTK = key_states.view_as(key_states)
        setattr(marked_BGTK, MARK, (self.keys, self.values, self.lengths_B))
        return marked_BGTK, value_states


def _marked(layer: Any, lengths_B: Tensor) -> Any:
    """Return a layer that shares the frozen one's tensors and marks what it hands out."""
    if isinstance(layer, LinearAttentionLayer):
        twin = object.__new__(type(layer))
        vars(twin).update(vars(layer))
        twin.recurrent_states = {
            index: _constant(state) for index, state in _numbered(layer.recurrent_states)
        }
        return twin
    if isinstance(layer, DynamicLayer) and not layer.is_sliding:
        twin = object.__new__(ApartAttention)
        vars(twin).update(vars(layer), lengths_B=lengths_B)
        return twin
    return layer


def _constant(state: Tensor) -> Tensor:
    """Return a view that carries that it is constant."""
    view = state.detach()
    setattr(view, MARK, True)
    return view


def _numbered(states: Any) -> list[tuple[int, Tensor]]:
    """The states by index; transformers keeps them in a dictionary or a list."""
    return list(states.items() if isinstance(states, dict) else enumerate(states))


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the signature of transformers' functions; returns `[B, T, H, K]`."""
    prefix = getattr(key, MARK, None)
    if prefix is not None and not dropout and not any(kwargs.get(n) is not None for n in UNKNOWN):
        prefix_k, prefix_v, lengths_B = prefix
        out_BHTK = frozen_prefix_attention(
            query, key, value, prefix_k, prefix_v, lengths_B, None, scaling
        )
        return out_BHTK.transpose(1, 2).contiguous(), None
    if prefix is not None:
        key, value = (torch.cat(pair, dim=2) for pair in zip(prefix, (key, value), strict=False))
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


def _dispatching(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the delta rule of a model's module: a marked state goes to the kernels."""

    @wraps(rule)
    def dispatch(
        query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        state = kwargs.get("initial_state")
        if state is None or not hasattr(state, MARK) or kwargs.get("cu_seqlens") is not None:
            return rule(query, key, value, g=g, beta=beta, **kwargs)
        normalise = bool(kwargs.get("use_qk_l2norm_in_kernel", False))
        # The cache keeps the state as it is, so that the one after the decision need not be known.
        return gated_delta_rule(query, key, value, g, beta, state, normalise=normalise), state

    setattr(dispatch, MARK, True)
    return dispatch
