"""The adapter for vLLM's model runner V2 on vLLM's own states and batches; graphs need a GPU, and the
checks in benchmarks/_gpu_steering_check.py run them there.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests_support.toys import TOKENS, VECTORS, WIDTH, make

from vectors.errors import NameNotFound
from vectors.steering.operators import apply_edit, combine, edit_of
from vectors.types import Phase
from workbench.engines.vllm import runner_v2
from workbench.engines.vllm.spec import STEER, STEER_ID, Injection, Resolved

pytest.importorskip("vllm", reason="vLLM is not installed on this machine")

SLOTS = 6
ADD = ("a", 1, 0.5, Phase.ALL, "add")
PROMPT = ("b", 0, -1.0, Phase.PROMPT, "add")
DECODE = ("c", 2, 1.0, Phase.DECODE, "ablate")


@pytest.fixture(params=["default.DefaultModelState", "mamba_hybrid.MambaHybridModelState"])
def runner(request, monkeypatch):
    """What `install` makes of vLLM's runner: a toy model, its steering, and the state that vLLM chose."""
    from importlib import import_module

    import vllm.v1.worker.gpu.model_runner as found

    module, name = request.param.split(".")
    chosen = getattr(import_module(f"vllm.v1.worker.gpu.model_states.{module}"), name)
    toy, steering = make(slots=SLOTS)

    def init_model_state(config: Any, model: Any) -> Any:
        """vLLM's, without what only a whole model has."""
        state = object.__new__(chosen)
        state.rope_state = state.prompt_embeds_state = None
        state.supports_mm_inputs = state._align_mode = False
        state.num_accepted_tokens_gpu = torch.zeros(SLOTS, dtype=torch.int32)
        state.device = torch.device("cpu")
        return state

    monkeypatch.setattr(found, "init_model_state", init_model_state)
    monkeypatch.setattr(
        found.GPUModelRunner, "sample_tokens", lambda self: SimpleNamespace(), raising=True
    )
    monkeypatch.setattr(runner_v2, "attach_steering", lambda model, config, device: steering)
    runner_v2.install()
    runner_v2.install()  # no second layer
    state = found.init_model_state(SimpleNamespace(speculative_config=None), toy)
    assert isinstance(state, chosen) and type(state).__name__ == f"Steered{name}"
    runner = object.__new__(found.GPUModelRunner)
    runner.model_state = state
    return SimpleNamespace(toy=toy, steering=steering, state=state, vllm=runner)


def arrive(state, slot, name, length, *terms, computed=0, steer_id=""):
    """A request comes, as vLLM's scheduler sends it."""
    from vllm import SamplingParams
    from vllm.v1.core.sched.output import NewRequestData

    text = Resolved(tuple(sorted(Injection(v, b, d, p, o) for v, b, d, p, o in terms))).to_json()
    params = SamplingParams(extra_args={STEER: text, STEER_ID: steer_id} if terms else None)
    new = NewRequestData(name, list(range(length)), [], params, None, ([],), computed, None)
    state.add_request(slot, new)


def step(runner, rows):
    """Prepare a step of `(name, slot, first position, count)` and return what the model makes of it."""
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

    buffers = InputBuffers(SLOTS, TOKENS, torch.device("cpu"))
    names, slots, firsts, counts = zip(*rows, strict=True)
    tokens = sum(counts)
    padded = tokens + 2
    positions_T = torch.full((padded,), 7)
    positions_T[:tokens] = torch.tensor(
        [first + i for first, count in zip(firsts, counts, strict=True) for i in range(count)]
    )
    batch = dataclasses.replace(
        InputBatch.make_dummy(len(rows), tokens, buffers),
        req_ids=list(names),
        idx_mapping=torch.tensor(slots),
        idx_mapping_np=np.array(slots),
        num_scheduled_tokens=np.array(counts, dtype=np.int32),
        num_tokens_after_padding=padded,
        query_start_loc=torch.tensor([0, *np.cumsum(counts)]),
        num_computed_tokens_np=np.array(firsts),
        positions=positions_T,
    )
    assert runner.state.prepare_inputs(batch, None) == {}
    assert not runner.steering.table.row_of_token_T[tokens:].any(), "padding is steered"
    return inputs(tokens), runner.toy(inputs(tokens))


def inputs(tokens):
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(tokens))


def naive(toy, h_D, *terms):
    """One token through the layers, edited behind each."""
    for block, layer in enumerate(toy.layers):
        h_D = h_D + torch.tanh(layer.mlp(h_D))
        edits = [
            edit_of(o, VECTORS[v].directions[b], 2.0, d) for v, b, d, _, o in terms if b == block
        ]
        if edits:
            h_D = apply_edit(h_D[None], combine(edits))[0]
    return h_D


def expect(runner, found, terms_T):
    h_TD, out_TD = found
    wanted = [naive(runner.toy, h_D, *terms) for h_D, terms in zip(h_TD, terms_T, strict=True)]
    torch.testing.assert_close(out_TD, torch.stack(wanted), rtol=1e-5, atol=1e-5)


def test_slots_are_vllms_own_and_each_token_gets_its_requests_edit(runner):
    arrive(runner.state, 4, "both", 3, PROMPT, DECODE)
    arrive(runner.state, 1, "plain", 5)
    arrive(runner.state, 2, "all", 2, ADD)
    # A prompt's end beside a chunk and a token that is decoded.
    found = step(runner, [("all", 2, 2, 1), ("both", 4, 1, 2), ("plain", 1, 0, 3)])
    expect(runner, found, [[ADD], [PROMPT], [PROMPT], [], [], []])
    # One token a request: the rows are known without the device.
    found = step(runner, [("both", 4, 3, 1), ("plain", 1, 3, 1), ("all", 2, 3, 1)])
    expect(runner, found, [[DECODE], [], [ADD]])


def test_a_slot_goes_from_one_request_to_the_next(runner):
    arrive(runner.state, 3, "first", 2, ADD)
    expect(runner, step(runner, [("first", 3, 0, 2)]), [[ADD], [ADD]])
    runner.state.remove_request("first")
    arrive(runner.state, 3, "second", 4)
    expect(runner, step(runner, [("second", 3, 0, 2)]), [[], []])
    # Preempted, it comes back elsewhere, as far as it was.
    runner.state.remove_request("second")
    arrive(runner.state, 0, "first", 2, PROMPT, DECODE, computed=1, steer_id="again")
    expect(runner, step(runner, [("first", 0, 1, 2)]), [[PROMPT], [DECODE]])
    runner.state.remove_request("first")
    proof = runner.steering.receipt("again")
    assert [proof[key] for key in ("cached", "prompt", "decode")] == [1, 1, 1]


def test_dummy_batches_are_not_steered(runner):
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

    arrive(runner.state, 0, "r", 4, ADD)
    step(runner, [("r", 0, 0, 4)])
    runner.state.prepare_inputs(
        InputBatch.make_dummy(2, 4, InputBuffers(SLOTS, TOKENS, torch.device("cpu"))), None
    )
    expect(runner, (inputs(4), runner.toy(inputs(4))), [[]] * 4)
    step(runner, [("r", 0, 0, 4)])
    runner.state.prepare_dummy_inputs(2, 4)
    expect(runner, (inputs(4), runner.toy(inputs(4))), [[]] * 4)


def test_what_cannot_be_steered_travels_with_the_steps_output(runner, monkeypatch):
    def gone(digest: str) -> Any:
        raise NameNotFound("The vector is not in the library.")

    monkeypatch.setattr(runner.steering.bank, "_load", gone)
    arrive(runner.state, 0, "lost", 2, ADD)
    assert set(runner.vllm.sample_tokens().workbench_refused) == {"lost"}
    assert not hasattr(runner.vllm.sample_tokens(), "workbench_refused")


def test_drafts_leave_positions_to_the_device(runner, monkeypatch):
    seen = []
    runner.state.workbench_drafts = True
    arrive(runner.state, 5, "r", 2, PROMPT, DECODE)
    expand = runner.steering.expand
    monkeypatch.setattr(
        runner.steering, "expand", lambda *given: (seen.append(given[-1]), expand(*given))[1]
    )
    expect(runner, step(runner, [("r", 5, 2, 1)]), [[DECODE]])
    assert seen == [None]
