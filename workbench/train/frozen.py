"""A context that is read once without gradients and then only looked at.

Shape letters: B rows, P context positions, T decision positions, N learnt positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from vectors.errors import InputError, ShapeMismatch
from workbench.train.cache import FrozenCache
from workbench.train.logits import logits_only_at
from workbench.train.modes import evaluating

__all__ = ["FrozenContext", "freeze_context"]


@dataclass(frozen=True)
class FrozenContext:
    """The state of a model after a context; any number of decisions and steps can use it.

    Args:
        model: the model that read the context.
        cache: keys, values and states, constant.
        mask_BP: bool `[B, P]`, false on the left padding.
        lengths_B: int64 `[B]`, context tokens of each row.
    """

    model: PreTrainedModel
    cache: FrozenCache
    mask_BP: Tensor
    lengths_B: Tensor

    def forward(
        self, decision_ids_BT: Tensor, decision_mask_BT: Tensor, keep_BT: Tensor | None = None
    ) -> Tensor:
        """Return the logits of the decision on top of the context, with gradients.

        `logits = f_theta(decision; K_P, V_P, S_P)`, where the context's keys, values and states are
        constants: `d logits / d theta` has no path through them (method.md 2, frozen-context
        training).

        Args:
            decision_ids_BT: int64 `[B, T]`, right-padded; its first token is the context's last.
            decision_mask_BT: bool `[B, T]`, false on the padding.
            keep_BT: bool `[B, T]`; where given, only these N positions get logits.

        Returns:
            `[B, T, V]`, or `[N, V]` where `keep_BT` is given, row by row.

        Raises:
            InputError: fewer than two positions; one alone would take the decode kernels of
                Gated-DeltaNet, which write the frozen state and have no backward pass.
            ShapeMismatch: rows that are not the context's.
        """
        rows, width = decision_ids_BT.shape
        if width < 2:
            raise InputError(
                "A decision needs at least two positions, the context's last token and one more; "
                "pad it on the right."
            )
        if rows != len(self.lengths_B):
            raise ShapeMismatch(
                f"The context has {len(self.lengths_B)} rows and the decision {rows}; "
                "give one decision for each context."
            )
        if keep_BT is not None:
            with logits_only_at(self.model, keep_BT):
                return self.forward(decision_ids_BT, decision_mask_BT)[0]
        steps_T = torch.arange(width, device=decision_ids_BT.device)
        with _checkpoints_read_the_cache(self.model):
            output = self.model(
                input_ids=decision_ids_BT,
                attention_mask=torch.cat([self.mask_BP, decision_mask_BT], dim=1).long(),
                position_ids=self.lengths_B[:, None] + steps_T,
                past_key_values=self.cache,
                use_cache=True,
            )
        return output.logits


def freeze_context(
    model: PreTrainedModel, input_ids_BT: Tensor, attention_mask_BT: Tensor
) -> FrozenContext:
    """Read left-padded contexts without gradients and return the state after them.

    The caller holds each context's last token back and gives it as the first token of the decision,
    because the first token that is learnt is predicted from it.

    Args:
        model: any mode; it reads in eval mode and is as it was afterwards.
        input_ids_BT: int64 `[B, P]`, padded on the left: a Gated-DeltaNet layer decays over padding
            on the right.
        attention_mask_BT: `[B, P]`, false or 0 on the padding.

    Raises:
        ShapeMismatch: ids and mask of different shapes.
        InputError: an empty context, or padding that is not on the left.
        ModelNotSupported: a kind of layer whose state cannot be frozen.
    """
    mask_BP = attention_mask_BT.bool()
    if input_ids_BT.shape != mask_BP.shape:
        raise ShapeMismatch(
            f"The context's ids {list(input_ids_BT.shape)} and mask {list(mask_BP.shape)} must "
            "have one shape."
        )
    if not mask_BP.numel() or not bool(mask_BP[:, -1].all()):
        raise InputError("Every context needs a token, and its padding on the left.")
    lengths_B = mask_BP.sum(dim=1)
    positions_BP = (mask_BP.long().cumsum(dim=1) - 1).clamp(min=0)
    # Checkpointed layers drop the cache while training; in eval mode they keep it.
    with evaluating(model), torch.no_grad():
        output = model(
            input_ids=input_ids_BT,
            attention_mask=mask_BP.long(),
            position_ids=positions_BP,
            use_cache=True,
            logits_to_keep=1,
        )
    return FrozenContext(model, FrozenCache(output.past_key_values), mask_BP, lengths_B)


@contextmanager
def _checkpoints_read_the_cache(model: PreTrainedModel) -> Iterator[None]:
    """Let checkpointed layers keep the cache, which is safe because recomputing writes nothing."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    before = [vars(layer).get("_can_checkpoint_with_cache") for layer in layers]
    for layer in layers:
        layer._can_checkpoint_with_cache = True
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            if value is None:
                del layer._can_checkpoint_with_cache
            else:
                layer._can_checkpoint_with_cache = value
