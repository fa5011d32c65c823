"""One step of training: freeze the context, forward the decision, backward, move.

Shape letters: B rows, P context positions, T decision positions, N learnt positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vectors.errors import RunFailed
from workbench.train.batches import Batch
from workbench.train.frozen import FrozenContext, freeze_context
from workbench.train.kernels import kernels_fit, read_by_kernels
from workbench.train.logits import whole_logits
from workbench.train.losses import SoftTargets, soft_loss, token_loss

__all__ = ["Read", "check_finite", "decision_logits", "decision_loss", "take_step"]

Read = Callable[[PreTrainedModel, Tensor, Tensor], FrozenContext]
"""How contexts are frozen: `freeze_context`, or a store that keeps them."""


def decision_logits(
    model: PreTrainedModel, batch: Batch, tier: int, read: Read = freeze_context
) -> Tensor:
    """Return the logits `[N, V]` of the learnt positions; tier 2 freezes the context by `read`."""
    if tier != 2:
        return whole_logits(model, batch)
    context = read(model, batch.context_ids_BP, batch.context_mask_BP)
    if kernels_fit(model):
        context = read_by_kernels(context)
    return context.forward(batch.decision_ids_BT, batch.decision_mask_BT, batch.decision_mask_BT)


def decision_loss(
    model: PreTrainedModel,
    batch: Batch,
    target: SoftTargets | None,
    tier: int,
    read: Read = freeze_context,
) -> Tensor:
    """Return the mean loss of a batch, against the teacher or the sampled tokens."""
    logits_NV = decision_logits(model, batch, tier, read)
    if target is None:
        return token_loss(logits_NV, batch.labels_N)
    return soft_loss(logits_NV, target)


def take_step(
    model: PreTrainedModel,
    batch: Batch,
    target: SoftTargets | None,
    parameters: Iterable[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    tier: int,
    clip: float,
    read: Read = freeze_context,
) -> tuple[float, float]:
    """Move the parameters once and return the loss and the norm of the gradient before clipping.

    Raises:
        RunFailed: a loss or gradient that is not finite; the weights are those before the step.
    """
    loss = decision_loss(model, batch, target, tier, read)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    numbers = loss.item(), norm.item()
    check_finite(*numbers)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return numbers


def check_finite(loss: float, norm: float) -> None:
    """Refuse a step that would spoil the weights.

    Raises:
        RunFailed: a loss or gradient that is not finite.
    """
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise RunFailed(
            f"The loss is {loss:g} and its gradient's norm {norm:g}; "
            "lower the learning rate or the dose."
        )
