"""A cache that models read and never write.

transformers' own cache writes keys, values and states in place while it reads them, which grows the
context by the decision and spoils the backward pass of Gated-DeltaNet layers. The layers here hand
out what a model needs and keep nothing.

Shape letters: B rows, P context positions, H heads, C channels of the convolution, K and E widths
of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from vectors.errors import ModelNotSupported

__all__ = ["FrozenCache"]


class _FrozenAttention(DynamicLayer):
    """Keys and values `[B, H, P, K]` of the context, joined with the decision's and not kept."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return _joined(self, key_states, value_states)


class _FrozenSlidingWindow(DynamicSlidingWindowLayer):
    """The last keys and values of the context, for layers that see a window."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return _joined(self, key_states, value_states)


class _FrozenRecurrent(LinearAttentionLayer):
    """Convolution state `[B, C, kernel]` and recurrent state `[B, H, K, E]` of the context."""

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, *args: Any, **kwargs: Any
    ) -> Tensor:
        return torch.cat([_filled(self.conv_states[state_idx]), conv_states], dim=-1)

    def update_recurrent_state(
        self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        return recurrent_states


_TWINS: dict[type, type] = {
    DynamicLayer: _FrozenAttention,
    DynamicSlidingWindowLayer: _FrozenSlidingWindow,
    LinearAttentionLayer: _FrozenRecurrent,
}


class FrozenCache(Cache):
    """A read-only view of a filled cache, for attention, sliding-window and Gated-DeltaNet layers.

    Raises:
        ModelNotSupported: a kind of layer whose state cannot be frozen.
    """

    def __init__(self, filled: Cache) -> None:
        super().__init__(layers=[_freeze(layer) for layer in filled.layers])


def _joined(layer: DynamicLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.cat([_filled(layer.keys), keys], dim=-2),
        torch.cat([_filled(layer.values), values], dim=-2),
    )


def _filled(state: Tensor | None) -> Tensor:
    if state is None:
        raise ModelNotSupported("A layer kept nothing of the context; train this model at tier 1.")
    return state


def _freeze(layer: Any) -> Any:
    twin = _TWINS.get(type(layer))
    if twin is None:
        raise ModelNotSupported(
            f"A layer whose cache is a {type(layer).__name__} cannot be frozen; "
            "train this model at tier 1."
        )
    # Names of the states differ between minor releases of transformers; all of them are taken over.
    frozen = object.__new__(twin)
    vars(frozen).update(vars(layer))
    return frozen
