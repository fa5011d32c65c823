"""A cache that models read and never write.

transformers' own cache writes keys, values and states in place while it reads them, which grows the
context by the decision and spoils the backward pass of Gated-DeltaNet layers. The layers here hand
out what a model needs and keep nothing.

Shape letters: B rows, P context positions, H heads, C channels of the convolution, K and E widths
of a head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from vectors.errors import ModelNotSupported

__all__ = ["FrozenCache", "State"]

SOURCE = "_filled_from"
State = dict[str, Tensor]
"""What one row of a batch leaves behind, `[1, ...]` without padding, by layer and name."""


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

    def rows(self, lengths: Sequence[int]) -> list[State]:
        """Take a left-padded batch apart; row r has `lengths[r]` context tokens.

        Raises:
            ModelNotSupported: a layer that keeps a window of the context.
        """
        found: list[State] = [{} for _ in lengths]
        for index, layer in enumerate(self.layers):
            for name, tensor in _states(layer):
                for row, length in enumerate(lengths):
                    own = tensor[row : row + 1]
                    if isinstance(layer, _FrozenAttention):
                        own = own[:, :, own.shape[2] - length :]
                    # A view would keep the whole batch.
                    found[row][f"{index}.{name}"] = own.clone()
        return found

    def skeleton(self) -> FrozenCache:
        """This cache without its tensors, to be filled by `with_rows`."""
        return self._filled_with(lambda index, name: torch.empty(0))

    def with_rows(self, rows: Sequence[State]) -> FrozenCache:
        """This cache with other rows; their contexts are padded on the left with zeros."""
        return self._filled_with(lambda index, name: _stacked([r[f"{index}.{name}"] for r in rows]))

    def padded(self, prefix: int) -> FrozenCache:
        """A copy whose contexts have `prefix` positions, padded on the left with zeros.

        Raises:
            ModelNotSupported: a layer that keeps a window of the context.
        """
        states = [dict(_states(layer)) for layer in self.layers]

        def tensor_of(index: int, name: str) -> Tensor:
            tensor = states[index][name]
            if name not in ("keys", "values"):
                return tensor.clone()
            return F.pad(tensor, (0, 0, prefix - tensor.shape[2], 0))

        return self._filled_with(tensor_of)

    def fill(self, other: FrozenCache) -> None:
        """Take over the states of `other`, in place; what is left of longer contexts stays.

        What the last call took is not copied again: a frozen state does not change.
        """
        for own, layer in zip(self.layers, other.layers, strict=True):
            for (name, into), (_, tensor) in zip(_states(own), _states(layer), strict=True):
                if getattr(into, SOURCE, None) is tensor:
                    continue
                setattr(into, SOURCE, tensor)
                if name in ("keys", "values"):
                    into = into[:, :, into.shape[2] - tensor.shape[2] :]
                into.copy_(tensor)

    def _filled_with(self, tensor_of: Callable[[int, str], Tensor]) -> FrozenCache:
        made = copy.copy(self)
        made.layers = []
        for index, layer in enumerate(self.layers):
            twin = copy.copy(layer)
            if isinstance(twin, _FrozenAttention):
                twin.keys, twin.values = tensor_of(index, "keys"), tensor_of(index, "values")
            else:
                for kind in ("conv_states", "recurrent_states"):
                    kept: dict[int, Tensor] = getattr(layer, kind)
                    setattr(twin, kind, {key: tensor_of(index, f"{kind}.{key}") for key in kept})
            made.layers.append(twin)
        return made


def _states(layer: Any) -> list[tuple[str, Tensor]]:
    if isinstance(layer, _FrozenAttention):
        return [("keys", _filled(layer.keys)), ("values", _filled(layer.values))]
    kinds = ("conv_states", "recurrent_states")
    if not all(isinstance(getattr(layer, kind, None), dict) for kind in kinds):
        raise ModelNotSupported(
            "A layer of this model keeps a window of the context, which cannot be reused row by "
            "row; leave the reuse of contexts off."
        )
    return [
        (f"{kind}.{key}", _filled(tensor))
        for kind in kinds
        for key, tensor in getattr(layer, kind).items()
    ]


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Rows `[1, ...]` as one batch; only keys and values `[1, H, P, K]` differ, in P."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.shape[2] for part in parts)
    return torch.cat([F.pad(part, (0, 0, width - part.shape[2], 0)) for part in parts])


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
