"""Adapter for vLLM's model runner V1: what was scheduled goes to `StepSteering`, hooks apply it.

Hooks on the decoder layers run in eager mode only, which is how the workbench starts its engine.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch

from vectors.store import Library
from workbench.engines.vllm.spec import STEER, STEER_ID
from workbench.engines.vllm.steering import Scheduled, StepSteering
from workbench.models.blocks import decoder_blocks

__all__ = ["TESTED", "install", "steering_of"]

TESTED = ("0.32.0",)


def install() -> None:
    """Wrap the runner's `load_model` and `_prepare_inputs`, once."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # noqa: PLC0415

    if getattr(GPUModelRunner._prepare_inputs, "workbench", False):
        return
    _wrap_prepare(GPUModelRunner)
    _wrap_load(GPUModelRunner)
    try:
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner  # noqa: PLC0415
    except ImportError:
        return
    if "load_model" in vars(CPUModelRunner):
        _wrap_load(CPUModelRunner)


def steering_of(runner: Any) -> StepSteering | None:
    """The runner's steering, or None before its model is loaded."""
    return getattr(runner, "workbench_steering", None)


def _wrap_load(cls: Any) -> None:
    original = cls.load_model

    @functools.wraps(original)
    def load_model(self: Any, *args: Any, **kw: Any) -> Any:
        out = original(self, *args, **kw)
        if steering_of(self) is None:
            _attach(self)
        return out

    cls.load_model = load_model


def _attach(runner: Any) -> None:
    layers = decoder_blocks(runner.model)
    library = Library(Path(os.environ["WORKBENCH_LIBRARY"]))
    width = runner.model_config.get_hidden_size()
    steering = StepSteering(library, width, len(layers))
    for block, layer in enumerate(layers):
        layer.register_forward_hook(functools.partial(_add, steering, block))
    runner.workbench_steering = steering


def _add(steering: StepSteering, block: int, layer: Any, inputs: Any, output: Any) -> Any:
    """Add to the residual stream, which vLLM's layers return as `(hidden, residual)` or as one."""
    if isinstance(output, torch.Tensor):
        return steering.apply(block, output)
    hidden_TD, residual_TD, *rest = output
    return (hidden_TD, steering.apply(block, residual_TD), *rest)


def _wrap_prepare(cls: Any) -> None:
    original = cls._prepare_inputs

    @functools.wraps(original)
    def prepare(
        self: Any, scheduler_output: Any, num_scheduled_tokens: Any, *args: Any, **kw: Any
    ) -> Any:
        out = original(self, scheduler_output, num_scheduled_tokens, *args, **kw)
        steering = steering_of(self)
        if steering is not None:
            # Here the batch is already this step's: vLLM updates it before it prepares inputs.
            steering.plan(_scheduled(self, num_scheduled_tokens), self.dtype, self.device)
        return out

    prepare.workbench = True  # type: ignore[attr-defined]
    cls._prepare_inputs = prepare


def _scheduled(runner: Any, counts: Any) -> list[Scheduled]:
    batch = runner.input_batch
    found = []
    for index, request in enumerate(batch.req_ids):
        state = runner.requests[request]
        params = state.sampling_params
        extra = (params.extra_args if params is not None else None) or {}
        found.append(
            Scheduled(
                request=request,
                start=int(batch.num_computed_tokens_cpu[index]),
                count=int(counts[index]),
                prompt_length=state.num_prompt_tokens,
                steer=extra.get(STEER),
                receipt=extra.get(STEER_ID, ""),
            )
        )
    return found
