"""Adapter for vLLM's model runner V1: what it schedules goes to `Steering`, from the host."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from torch import Tensor

from vectors.errors import ModelNotSupported
from workbench.engines.vllm.attach import attach_steering
from workbench.engines.vllm.refusal import wrap_sampling
from workbench.engines.vllm.steering import Steering

__all__ = ["install", "paths"]


def install() -> None:
    """Wrap the runner's methods, once."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # noqa: PLC0415

    if getattr(GPUModelRunner._prepare_inputs, "workbench", False):
        return
    _wrap(GPUModelRunner, "load_model", _load_model)
    _wrap(GPUModelRunner, "_update_states", _update_states)
    _wrap(GPUModelRunner, "_prepare_inputs", _prepare_inputs)
    _wrap(GPUModelRunner, "_dummy_run", _dummy_run)
    wrap_sampling(GPUModelRunner, lambda runner: getattr(runner, "workbench_steering", None))
    try:
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner  # noqa: PLC0415
    except ImportError:
        return
    if "load_model" in vars(CPUModelRunner):
        _wrap(CPUModelRunner, "load_model", _load_model)


def _wrap(cls: Any, name: str, around: Any) -> None:
    original = getattr(cls, name)

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kw: Any) -> Any:
        return around(self, original, *args, **kw)

    wrapper.workbench = True  # type: ignore[attr-defined]
    setattr(cls, name, wrapper)


def _load_model(runner: Any, original: Any, *args: Any, **kw: Any) -> Any:
    if getattr(runner, "use_async_spec_decode", False):
        # There the host counts drafts as accepted that the device may still refuse.
        raise ModelNotSupported(
            "Steering does not work with speculative decoding that is scheduled ahead on vLLM's "
            "model runner V1; add --no-async-scheduling."
        )
    out = original(runner, *args, **kw)
    if getattr(runner, "workbench_steering", None) is None:
        steering = attach_steering(runner.model, runner.vllm_config, runner.device)
        runner.workbench_steering = steering
    return out


def _update_states(runner: Any, original: Any, scheduler_output: Any) -> Any:
    """Requests come and go here, even in a step that runs no token."""
    out = original(runner, scheduler_output)
    steering: Steering = runner.workbench_steering
    for request in scheduler_output.finished_req_ids:
        steering.remove(request)
    if scheduler_output.scheduled_cached_reqs.resumed_req_ids:
        steering.look_again()
    for new in scheduler_output.scheduled_new_reqs:
        params = new.sampling_params
        steering.add(
            new.req_id,
            params.extra_args if params is not None else None,
            runner.requests[new.req_id].num_prompt_tokens,
            new.num_computed_tokens,
        )
    return out


def _prepare_inputs(
    runner: Any, original: Any, scheduler_output: Any, num_scheduled_tokens: Any, *args: Any
) -> Any:
    out = original(runner, scheduler_output, num_scheduled_tokens, *args)
    steering: Steering = runner.workbench_steering
    if not steering.idle:
        # Here the batch is already this step's: vLLM updates it before it prepares inputs.
        batch = runner.input_batch
        count = batch.num_reqs
        slots_N = steering.slots(batch.req_ids[:count])
        starts_N = np.asarray(batch.num_computed_tokens_cpu[:count], dtype=np.int64)
        counts_N = np.asarray(num_scheduled_tokens[:count], dtype=np.int64)
        steering.place(slots_N, starts_N, counts_N)
        steering.ran(slots_N, starts_N, counts_N)
    return out


def _dummy_run(runner: Any, original: Any, *args: Any, **kw: Any) -> Any:
    if (steering := getattr(runner, "workbench_steering", None)) is not None:
        steering.rest()
    return original(runner, *args, **kw)


def paths(runner: Any) -> dict[str, Any]:
    """How a dummy batch can run, for the self-test; the first way is without graphs."""
    from vllm.config import CUDAGraphMode  # noqa: PLC0415

    def alone(tokens: int) -> Tensor:
        return runner._dummy_run(tokens, cudagraph_runtime_mode=CUDAGraphMode.NONE)[0]

    def decode(tokens: int) -> Tensor:
        return runner._dummy_run(tokens, uniform_decode=True)[0]

    def mixed(tokens: int) -> Tensor:
        return runner._dummy_run(tokens)[0]

    found = {"compiled": alone}
    if runner.device.type == "cuda" and not runner.model_config.enforce_eager:
        found |= {"decode graph": decode, "mixed graph": mixed}
    return found
