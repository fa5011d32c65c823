"""A request that a worker cannot steer ends with an error, whatever client sent it.

The worker finds out when the request begins: a vector that has left the library since the front end
resolved it, or one that does not fit. What it refuses travels with the output of the step, and the
scheduler ends the request before a token of that step leaves, and takes its blocks out of the prefix
cache, where they would pass for steered ones.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from workbench.engines.vllm.steering import Steering

__all__ = ["carry", "install", "wrap_sampling"]


def carry(output: Any, refused: Mapping[str, str]) -> None:
    """Put what was refused on the output of a step, or on what will become it."""
    for name in ("_model_runner_output", "model_runner_output"):
        output = getattr(output, name, output)
    output.workbench_refused = dict(refused)


def wrap_sampling(runner_class: Any, steering_of: Any) -> None:
    """Make a runner's `sample_tokens` carry what its steering refused."""
    original = runner_class.sample_tokens

    @functools.wraps(original)
    def sample_tokens(self: Any, *args: Any, **kw: Any) -> Any:
        output = original(self, *args, **kw)
        steering: Steering | None = steering_of(self)
        if output is not None and steering is not None and steering.refused:
            carry(output, steering.refused)
            steering.refused.clear()
        return output

    runner_class.sample_tokens = sample_tokens


def install() -> None:
    """Wrap `Scheduler.update_from_output`, once."""
    from vllm.v1.core.sched.scheduler import Scheduler  # noqa: PLC0415

    original = Scheduler.update_from_output
    if getattr(original, "workbench", False):
        return

    @functools.wraps(original)
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        refused = getattr(model_runner_output, "workbench_refused", None)
        if not refused:
            return original(self, scheduler_output, model_runner_output)
        ended = [_end(self, name, why) for name, why in refused.items()]
        return _tell(
            original(self, scheduler_output, model_runner_output),
            [x for x in ended if x is not None],
        )

    update_from_output.workbench = True  # type: ignore[attr-defined]
    Scheduler.update_from_output = update_from_output


def _end(scheduler: Any, name: str, why: str) -> tuple[int, str, str] | None:
    from vllm.logger import init_logger  # noqa: PLC0415
    from vllm.v1.request import RequestStatus  # noqa: PLC0415

    request = scheduler.requests.get(name)
    if request is None or request.is_finished():
        return None
    init_logger("vllm.workbench").error("Request %s was not steered and has ended: %s", name, why)
    groups = scheduler.kv_cache_manager.get_block_ids(name)
    scheduler.kv_cache_manager.evict_blocks({block for group in groups for block in group})
    scheduler.finish_requests(name, RequestStatus.FINISHED_ERROR)
    return request.client_index, name, why


def _tell(outputs: dict[int, Any], ended: list[tuple[int, str, str]]) -> dict[int, Any]:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason  # noqa: PLC0415

    for client, name, why in ended:
        last = EngineCoreOutput(name, [], finish_reason=FinishReason.ERROR, stop_reason=why)
        outputs.setdefault(client, EngineCoreOutputs()).outputs.append(last)
    return outputs
