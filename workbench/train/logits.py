"""Logits at the positions that are learnt, and nowhere else.

Shape letters: B rows, T positions of a row, N learnt positions of all rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vectors.errors import ModelNotSupported
from workbench.train.batches import Batch

__all__ = ["logits_only_at", "whole_logits"]


@contextmanager
def logits_only_at(model: PreTrainedModel, keep_BT: Tensor) -> Iterator[None]:
    """Make `model` return logits `[1, N, V]` of the positions that `keep_BT` marks, row by row.

    The hidden states are picked just before the output matrix, so that whatever the architecture
    does after it (soft caps, scales) still happens. The output matrix and the softmax over V are
    the widest work of a small model; padding pays for neither.

    Args:
        model: a causal language model.
        keep_BT: bool `[B, T]`, N of them true.

    Raises:
        ModelNotSupported: the model has no output matrix.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise ModelNotSupported(
            f"{type(model).__name__} has no output matrix; use a causal language model."
        )

    def pick(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (args[0][keep_BT][None],)

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def whole_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the logits `[N, V]` at every learnt position, in one graph through the context.

    This is tier 1 (prompt-masked training) where gradients are on, and the teacher where they are
    off. Row by row, position t of the result predicts `batch.labels_N[t]`.
    """
    ids_BT = torch.cat([batch.context_ids_BP, batch.decision_ids_BT], dim=1)
    mask_BT = torch.cat([batch.context_mask_BP, batch.decision_mask_BT], dim=1)
    keep_BT = torch.cat([torch.zeros_like(batch.context_mask_BP), batch.decision_mask_BT], dim=1)
    positions_BT = (mask_BT.long().cumsum(dim=1) - 1).clamp(min=0)
    with logits_only_at(model, keep_BT):
        output = model(
            input_ids=ids_BT,
            attention_mask=mask_BT.long(),
            position_ids=positions_BT,
            use_cache=False,
        )
    return output.logits[0]
