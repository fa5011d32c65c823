"""Adapter for vLLM's model runner V2: its `ModelState` learns to steer.

Whatever state vLLM chose for the model becomes an instance of a subclass that also keeps the rows;
vLLM calls it when requests come and go, and before each step, graphs included.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from workbench.engines.vllm.attach import attach_steering
from workbench.engines.vllm.refusal import wrap_sampling
from workbench.engines.vllm.steering import Steering
from workbench.engines.vllm.tokens import Array

__all__ = ["install", "paths"]


def install() -> None:
    """Wrap `init_model_state` where the runner finds it, once."""
    import vllm.v1.worker.gpu.model_runner as found  # noqa: PLC0415

    model_runner: Any = found

    original = model_runner.init_model_state
    if getattr(original, "workbench", False):
        return

    @functools.wraps(original)
    def init_model_state(vllm_config: Any, model: Any, *args: Any, **kw: Any) -> Any:
        state: Any = original(vllm_config, model, *args, **kw)
        state.workbench_steering = attach_steering(model, vllm_config, state.device)
        # With drafts the host only guesses how far a request has come.
        state.workbench_drafts = vllm_config.speculative_config is not None
        # The choice among vLLM's states stays vLLM's, in every version.
        state.__class__ = _steered(type(state))
        return state

    init_model_state.workbench = True  # type: ignore[attr-defined]
    model_runner.init_model_state = init_model_state
    wrap_sampling(
        model_runner.GPUModelRunner,
        lambda runner: getattr(runner.model_state, "workbench_steering", None),
    )


@functools.cache
def _steered(cls: Any) -> type:
    """The subclass of vLLM's state `cls` whose methods, those that vLLM calls, also steer.

    It has one base alone, so that an instance of `cls` can become one of it.
    """

    class Steered(cls):
        workbench_steering: Steering
        workbench_drafts: bool

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            """A request takes the slot `req_index`."""
            super().add_request(req_index, new_req_data)
            params = new_req_data.sampling_params
            self.workbench_steering.add(
                new_req_data.req_id,
                params.extra_args if params is not None else None,
                len(new_req_data.prompt_token_ids),
                new_req_data.num_computed_tokens,
                req_index,
            )

        def remove_request(self, req_id: str) -> None:
            """A request has ended or was preempted."""
            super().remove_request(req_id)
            self.workbench_steering.remove(req_id)

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
            """Before each step: give its tokens their rows."""
            steering = self.workbench_steering
            if not input_batch.req_ids or not steering.knows(input_batch.req_ids[0]):
                steering.rest()  # a dummy batch
            elif not steering.idle:
                steering.expand(
                    input_batch.positions,
                    input_batch.query_start_loc,
                    input_batch.idx_mapping,
                    input_batch.num_reqs,
                    input_batch.num_tokens_after_padding,
                    None if self.workbench_drafts else _decoding(input_batch),
                )
                steering.ran(
                    input_batch.idx_mapping_np,
                    input_batch.num_computed_tokens_np,
                    input_batch.num_scheduled_tokens,
                )
            return super().prepare_inputs(input_batch, req_states)

        def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
            """Before a graph is recorded: no token has a row."""
            self.workbench_steering.rest()
            return super().prepare_dummy_inputs(num_reqs, num_tokens)

    Steered.__name__ = Steered.__qualname__ = f"Steered{cls.__name__}"
    return Steered


def _decoding(input_batch: Any) -> tuple[Array, Array] | None:
    """Slots and positions of a step in which every request runs one."""
    if input_batch.num_tokens != input_batch.num_reqs:
        return None
    return input_batch.idx_mapping_np, input_batch.num_computed_tokens_np


def paths(runner: Any) -> dict[str, Any]:
    """How a dummy batch can run, for the self-test; the first way is without graphs."""

    def alone(tokens: int) -> Tensor:
        return runner._dummy_run(tokens, skip_attn=True, is_profile=True)[0]

    def decode(tokens: int) -> Tensor:
        # With speculative decoding a request decodes several tokens at once.
        whole = tokens + -tokens % runner.decode_query_len
        return runner._dummy_run(whole, uniform_decode=True)[0]

    def mixed(tokens: int) -> Tensor:
        return runner._dummy_run(tokens)[0]

    found = {"compiled": alone}
    if not runner.model_config.enforce_eager:
        # Batches of one token a request replay a full graph where there are such.
        found |= {"decode graph": decode, "mixed graph": mixed}
    return found
