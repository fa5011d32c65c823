"""Steps of a few fixed shapes, recorded on CUDA and replayed.

A step on a frozen context is so small that starting its kernels one by one takes longer than the
kernels themselves. Here a batch is copied into tensors of a fixed shape, and what reads them is
recorded as a CUDA graph the first time that the shape is seen. Where there is no CUDA, the same
work is done on the same tensors without a record.

Shape letters: B rows, P context positions, T decision positions, N = B T, V vocabulary, K tokens
that the teacher's distribution keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from workbench.train.batches import Batch
from workbench.train.frozen import FrozenContext, freeze_context
from workbench.train.fused import fused
from workbench.train.kernels import kernels_fit, read_by_kernels
from workbench.train.losses import SoftTargets, soft_loss, token_loss
from workbench.train.step import Read, check_finite

__all__ = ["RecordedSteps"]

PREFIX, WIDTH = 512, 32
"""Contexts and decisions are padded to multiples of these."""


class RecordedSteps:
    """Takes the steps of `workbench.train.step.take_step` at tier 2, by replaying them.

    Every shape keeps the gradients and activations of its own record on the device.

    Args:
        model: whose `parameters` learn.
        optimizer: over them; its step is recorded, too, where it can `prepare` one.
        clip: largest norm of the gradient.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        parameters: Iterable[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        clip: float,
    ) -> None:
        self.model, self.parameters = model, list(parameters)
        self.optimizer, self.clip = optimizer, clip
        self._shapes: dict[tuple[int, ...], _Shape] = {}
        self._pool: Any = None

    def take(
        self, batch: Batch, target: SoftTargets | None, read: Read = freeze_context
    ) -> tuple[float, float]:
        """Move the parameters once and return the loss and the norm of the gradient before clipping.

        Raises:
            RunFailed: a loss or gradient that is not finite; the weights are those before the step.
            ModelNotSupported: a layer that keeps a window of the context.
        """
        context = read(self.model, batch.context_ids_BP, batch.context_mask_BP)
        shape = self._shape(batch, target, context)
        shape.fill(batch, target, context)
        self._run(shape)
        for parameter, gradient in zip(self.parameters, shape.gradients, strict=True):
            parameter.grad = gradient
        prepare = getattr(self.optimizer, "prepare", None)
        calls = [self.optimizer.step] if prepare is None else prepare()
        loss, norm = shape.numbers.tolist()
        check_finite(loss, norm)
        self._move(shape, calls, record=prepare is not None)
        for parameter in self.parameters:
            parameter.grad = None
        return loss, norm

    def _shape(self, batch: Batch, target: SoftTargets | None, context: FrozenContext) -> _Shape:
        rows, width = batch.decision_ids_BT.shape
        kept = 0 if target is None else target.ids_NK.shape[1]
        # One position of padding at least: without any, transformers leaves the mask out, but only
        # where it does not see that it is recorded.
        prefix = _round_up(context.mask_BP.shape[1] + 1, PREFIX)
        key = (rows, prefix, _round_up(width, WIDTH), kept)
        if key not in self._shapes:
            self._shapes[key] = _Shape(context, *key)
        return self._shapes[key]

    def _run(self, shape: _Shape) -> None:
        """Forward and backward; afterwards the shape has the gradients and the two numbers."""
        if self.model.device.type != "cuda":
            self._work(shape)
        else:
            if shape.steps is None:
                shape.steps = self._record(lambda: self._work(shape), warm=2)
            shape.steps.replay()

    def _work(self, shape: _Shape) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        with fused(self.model) if shape.by_kernels else nullcontext():
            loss = shape.loss()
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        shape.numbers.copy_(torch.stack([loss.detach().float(), norm.float()]))
        shape.gradients = [parameter.grad for parameter in self.parameters]

    def _move(self, shape: _Shape, calls: Sequence[Callable[[], Any]], record: bool) -> None:
        """Take the optimizer's step: the first as it is, so that its tables are there to record."""

        def move() -> None:
            for call in calls:
                call()

        if self.model.device.type != "cuda" or not record or not shape.moved:
            move()
            shape.moved = True
            return
        if shape.moves is None:
            shape.moves = self._record(move, warm=0)
        shape.moves.replay()

    def _record(self, work: Callable[[], None], warm: int) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warm):
                work()
        torch.cuda.current_stream().wait_stream(side)
        for parameter in self.parameters if warm else ():
            parameter.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        self._pool = graph.pool()
        return graph


class _Shape:
    """The tensors that a record reads, and what it leaves."""

    def __init__(
        self, context: FrozenContext, rows: int, prefix: int, width: int, kept: int
    ) -> None:
        device = context.mask_BP.device

        def new(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.ids_BT = new(rows, width)
        self.mask_BT = new(rows, width, dtype=torch.bool)
        self.labels_N = new(rows * width)
        self.weights_N = new(rows * width, dtype=torch.float32)
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
        self.by_kernels = kernels_fit(context.model)
        if self.by_kernels:
            self.context = read_by_kernels(self.context)
        self.numbers = new(2, dtype=torch.float32)
        self.gradients: list[Tensor | None] = []
        self.steps: torch.cuda.CUDAGraph | None = None
        self.moves: torch.cuda.CUDAGraph | None = None
        self.moved = False

    def fill(self, batch: Batch, target: SoftTargets | None, context: FrozenContext) -> None:
        """Copy a step's inputs in, without waiting for the device."""
        width = batch.decision_ids_BT.shape[1]
        self.mask_BT.zero_()[:, :width].copy_(batch.decision_mask_BT)
        self.ids_BT.zero_()[:, :width].copy_(batch.decision_ids_BT)
        learnt_N = self.mask_BT.flatten()
        # The how-manieth learnt position each one is; padding repeats one and weighs nothing.
        place_N = (learnt_N.cumsum(0) - 1).clamp(min=0)
        self.labels_N.copy_(batch.labels_N[place_N])
        self.weights_N.copy_(learnt_N / learnt_N.sum())
        if self.target is not None and target is not None:
            self.target.ids_NK.copy_(target.ids_NK[place_N])
            self.target.log_probs_NK.copy_(target.log_probs_NK[place_N])
            self.target.log_rest_N.copy_(target.log_rest_N[place_N])
        P = context.mask_BP.shape[1]
        mask_BP = self.context.mask_BP.zero_()
        mask_BP[:, mask_BP.shape[1] - P :].copy_(context.mask_BP)
        self.context.lengths_B.copy_(context.lengths_B)
        self.cache.fill(context.cache)

    def loss(self) -> Tensor:
        """The mean loss of the learnt positions."""
        logits_NV = self.context.forward(self.ids_BT, self.mask_BT).flatten(0, 1)
        if self.target is None:
            return token_loss(logits_NV, self.labels_N, self.weights_N)
        return soft_loss(logits_NV, self.target, self.weights_N)


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step
