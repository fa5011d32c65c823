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
from torch import nn
from transformers import PreTrainedModel

from workbench.train.apollo import Apollo
from workbench.train.batches import Batch
from workbench.train.factored import Factors, clip_gradients, drop_factors, keep_factors
from workbench.train.frozen import FrozenContext, freeze_context
from workbench.train.fused import fused
from workbench.train.joined import Group, JoinedWeights
from workbench.train.kernels import kernels_fit
from workbench.train.losses import SoftTargets
from workbench.train.shapes import StepShape
from workbench.train.step import Read, check_finite

__all__ = ["RecordedSteps"]

PREFIX, WIDTH = 512, 32
"""Contexts and decisions are padded to multiples of these."""
FEW = 256
"""Positions of a step up to which APOLLO moves matrices by factors of their gradients."""


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
        self._joined = JoinedWeights(model, self.parameters) if kernels_fit(model) else None
        self._projected = {
            parameter
            for group in optimizer.param_groups
            for parameter in group["params"]
            if isinstance(optimizer, Apollo)
            and parameter.ndim == 2
            and min(parameter.shape) > group["rank"]
        }
        self._shapes: dict[tuple[int, ...], StepShape] = {}
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
        try:
            for parameter, gradient in shape.gradients.items():
                if isinstance(gradient, Factors):
                    keep_factors(parameter, gradient)
                else:
                    parameter.grad = gradient
            prepare = getattr(self.optimizer, "prepare", None)
            calls = [self.optimizer.step] if prepare is None else prepare()
            loss, norm = shape.numbers.tolist()
            check_finite(loss, norm)
            self._move(shape, calls, record=prepare is not None)
        finally:
            for parameter in self.parameters:
                parameter.grad = None
                drop_factors(parameter)
        return loss, norm

    def _shape(self, batch: Batch, target: SoftTargets | None, context: FrozenContext) -> StepShape:
        rows, width = batch.decision_ids_BT.shape
        kept = 0 if target is None else target.ids_NK.shape[1]
        # One position of padding at least: without any, transformers leaves the mask out, but only
        # where it does not see that it is recorded.
        prefix = _round_up(context.mask_BP.shape[1] + 1, PREFIX)
        key = (rows, prefix, _round_up(width, WIDTH), kept)
        if key not in self._shapes:
            self._shapes[key] = StepShape(context, *key, by_kernels=kernels_fit(self.model))
        return self._shapes[key]

    def _run(self, shape: StepShape) -> None:
        """Forward and backward; afterwards the shape has the gradients and the two numbers."""
        if self.model.device.type != "cuda":
            self._work(shape)
        else:
            if shape.steps is None:
                shape.steps = self._record(lambda: self._work(shape), warm=2)
                shape.send()
            shape.steps.replay()

    def _work(self, shape: StepShape) -> None:
        shape.gradients = {}
        for parameter in self.parameters:
            parameter.grad = None
        groups = list(self._joined.groups.values()) if self._joined is not None else []
        rows, width = shape.ids_BT.shape
        if self._joined is not None:
            few = [g for g in groups if self._keeps_factors(g)] if rows * width <= FEW else []
            self._joined.begin(rows, width, few)
        with fused(self.model, joined=self._joined) if shape.by_kernels else nullcontext():
            loss = shape.loss()
            loss.backward()
        leaves = [*self.parameters, *(group.weight for group in groups)]
        formed = [leaf.grad for leaf in leaves if leaf.grad is not None]
        factors = [kept for group in groups if (kept := group.factors()) is not None]
        squares = shape.squares(factors) if factors else None
        norm = clip_gradients(formed, factors, self.clip, squares)
        shape.numbers.copy_(torch.stack([loss.detach().float(), norm]))
        shape.gradients |= {p: p.grad for p in self.parameters if p.grad is not None}
        if self._joined is not None:
            shape.gradients |= self._joined.hand_out(lambda p: p in self._projected)
            self._joined.begin(rows, width)
        for parameter in self.parameters:
            parameter.grad = None

    def _keeps_factors(self, group: Group) -> bool:
        """Whether the optimizer can move what is in a group by factors, most of it at least."""
        aligned = not any(side % 8 for weight in group.owned for side in weight.shape)
        return aligned and any(weight in self._projected for weight in group.owned)

    def _move(self, shape: StepShape, calls: Sequence[Callable[[], Any]], record: bool) -> None:
        """Take the optimizer's step: the first as it is, so that its tables are there to record."""

        def move() -> None:
            for call in calls:
                call()

        if self.model.device.type != "cuda" or not (record and calls and shape.moved):
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
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        self._pool = graph.pool()
        return graph


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step
