"""Tensors of one fixed shape, into which the inputs of a step are copied.

Shape letters: B rows, P context positions, T decision positions, N = B T, V vocabulary, K tokens
that the teacher's distribution keeps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from workbench.train.batches import Batch
from workbench.train.factored import Factors
from workbench.train.frozen import FrozenContext
from workbench.train.kernels import read_by_kernels
from workbench.train.losses import SoftTargets, soft_loss, token_loss

__all__ = ["StepShape"]


class StepShape:
    """The tensors that a record reads, and what it leaves.

    Args:
        context: any of the model's, for the shapes of its states.
        rows, prefix, width: B, P and T.
        kept: K, or 0 where sampled tokens are learnt.
        by_kernels: read the context by kernels, and spend the logits.
    """

    def __init__(
        self,
        context: FrozenContext,
        rows: int,
        prefix: int,
        width: int,
        kept: int,
        by_kernels: bool,
    ) -> None:
        device = context.mask_BP.device

        def new(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.ids_BT = new(rows, width)
        self.mask_BT = new(rows, width, dtype=torch.bool)
        self.labels_N = new(rows * width)
        self.target = None
        if kept:
            self.target = SoftTargets(
                new(rows * width, kept, dtype=torch.int32),
                new(rows * width, kept, dtype=torch.float16),
                new(rows * width, dtype=torch.float32),
            )
        self.cache = context.cache.padded(prefix)
        self.context = FrozenContext(
            context.model, self.cache, new(rows, prefix, dtype=torch.bool), new(rows)
        )
        self.by_kernels = by_kernels
        if by_kernels:
            self.context = read_by_kernels(self.context)
        self._filled_from: FrozenContext | None = None
        self.numbers = new(2, dtype=torch.float32)
        self.gradients: dict[nn.Parameter, Tensor | Factors] = {}
        self._where: Tensor | None = None
        self._table: Tensor | None = None
        self.steps: torch.cuda.CUDAGraph | None = None
        self.moves: torch.cuda.CUDAGraph | None = None
        self.moved = False

    def fill(self, batch: Batch, target: SoftTargets | None, context: FrozenContext) -> None:
        """Copy a step's inputs in, in few launches and without waiting for the device."""
        width, learnt = batch.decision_ids_BT.shape[1], len(batch.labels_N)
        pairs = [(self.ids_BT, batch.decision_ids_BT), (self.mask_BT, batch.decision_mask_BT)]
        for into, given in pairs:
            if width < into.shape[1]:
                into.zero_()
            into[:, :width].copy_(given)
        self.labels_N[:learnt].copy_(batch.labels_N)
        if self.target is not None and target is not None:
            self.target.ids_NK[:learnt].copy_(target.ids_NK)
            self.target.log_probs_NK[:learnt].copy_(target.log_probs_NK)
            self.target.log_rest_N[:learnt].copy_(target.log_rest_N)
        if context is self._filled_from:
            return
        P = context.mask_BP.shape[1]
        mask_BP = self.context.mask_BP.zero_()
        mask_BP[:, mask_BP.shape[1] - P :].copy_(context.mask_BP)
        self.context.lengths_B.copy_(context.lengths_B)
        self.cache.fill(context.cache)
        self._filled_from = context

    def loss(self) -> Tensor:
        """The mean loss of the learnt positions."""
        logits_NV = self.context.forward(self.ids_BT, self.mask_BT).flatten(0, 1)
        learnt_N = self.mask_BT.flatten()
        weights_N = learnt_N / learnt_N.sum()
        # The how-manieth learnt position each one is; padding repeats one and weighs nothing.
        place_N = (learnt_N.cumsum(0) - 1).clamp(min=0)
        labels_N, target = self.labels_N[place_N], self.target
        if target is not None:
            columns = (target.ids_NK, target.log_probs_NK, target.log_rest_N)
            target = SoftTargets(*(column[place_N] for column in columns))
        if self.by_kernels and logits_NV.is_cuda:
            from steer_kernels.soft_loss import spending_soft_loss  # noqa: PLC0415  # imports triton

            if target is None:
                target = SoftTargets.certain(labels_N, 1, logits_NV.shape[1])
            columns = (target.ids_NK, target.log_probs_NK, target.log_rest_N)
            return spending_soft_loss(logits_NV, *columns, weights_N)
        if target is None:
            return token_loss(logits_NV, labels_N, weights_N)
        return soft_loss(logits_NV, target, weights_N)

    def squares(self, factors: Sequence[Factors]) -> Tensor:
        """The squared norms of factored gradients; a record finds the factors by `send`."""
        if not self.ids_BT.is_cuda:
            return torch.stack([kept.square() for kept in factors])
        from steer_kernels.gram import factor_squares, factor_table  # noqa: PLC0415  # imports triton

        inputs, output_grads = zip(*(kept.joined() for kept in factors), strict=True)
        self._where = factor_table(inputs, output_grads)
        if self._table is None:
            self._table = torch.empty_like(self._where, device=inputs[0].device)
        if not torch.cuda.is_current_stream_capturing():
            self.send()
        return factor_squares(self._table, len(inputs[0]), inputs[0].dtype)

    def send(self) -> None:
        """Tell the device where the factors of the last pass lie."""
        if self._table is not None and self._where is not None:
            self._table.copy_(self._where)
