"""Kernels in a model: the step's loss and gradients are those of transformers' own functions.

On a machine without CUDA the references stand in for the kernels; how a model reaches them is the
same.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen3_5 import modeling_qwen3_5

from vectors.errors import ModelNotSupported
from workbench.train import Decision, kernels, step
from workbench.train.batches import collate
from workbench.train.frozen import FrozenContext, freeze_context
from workbench.train.kernels import kernels_fit, read_by_kernels
from workbench.train.step import decision_loss

P, T = 11, 6
CONTEXTS = torch.tensor([P, 4])
DECISIONS = torch.tensor([4, T])


@pytest.fixture(autouse=True)
def _own_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests find transformers' function as it was."""
    monkeypatch.setattr(modeling_qwen3_5, kernels.RULE, getattr(modeling_qwen3_5, kernels.RULE))


def read(model) -> FrozenContext:
    ids_BP = torch.randint(0, 128, (2, P), generator=torch.Generator().manual_seed(1))
    return freeze_context(model, ids_BP, torch.arange(P) >= P - CONTEXTS[:, None])


def learn(model, context: FrozenContext) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of right-padded decisions and the gradient of every parameter."""
    ids_BT = torch.randint(0, 128, (2, T), generator=torch.Generator().manual_seed(2))
    mask_BT = torch.arange(T) < DECISIONS[:, None]
    logits_NV = context.forward(ids_BT, mask_BT, mask_BT)
    loss = F.cross_entropy(logits_NV, ids_BT.roll(-1, 1)[mask_BT])
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), found


@pytest.mark.parametrize("checkpointed", [False, True])
def test_loss_and_gradients_are_those_of_transformers(
    model, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = read(model)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    true_loss, true = learn(model, context)

    calls = []
    for name in ("frozen_prefix_attention", "gated_delta_rule"):
        own = getattr(kernels, name)

        def counted(*args, own=own, name=name, **kwargs):
            calls.append(name)
            return own(*args, **kwargs)

        monkeypatch.setattr(kernels, name, counted)
    loss, found = learn(model, read_by_kernels(context))
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * 3
    runs = 2 if checkpointed else 1
    assert calls.count("frozen_prefix_attention") == runs * kinds.count("full_attention")
    assert calls.count("gated_delta_rule") == runs * kinds.count("linear_attention")
    assert torch.allclose(loss, true_loss, atol=1e-5)
    assert found.keys() == true.keys()
    for name, gradient in true.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_the_context_is_not_changed_and_both_ways_may_take_turns(model) -> None:
    context = read(model)
    before, _ = learn(model, context)
    fast = read_by_kernels(context)
    losses = [learn(model, c)[0] for c in (fast, context, read_by_kernels(fast))]
    assert torch.equal(losses[1], before)
    assert torch.equal(losses[0], losses[2])
    assert torch.allclose(losses[0], before, atol=1e-5)
    fresh, _ = learn(model, read(model))
    assert torch.equal(fresh, before)


def test_sliding_windows_keep_transformers_way(sliding) -> None:
    context = read(sliding)
    true, _ = learn(sliding, context)
    assert torch.equal(learn(sliding, read_by_kernels(context))[0], true)


def test_a_soft_cap_joins_the_keys_and_keeps_transformers_way(llama, monkeypatch) -> None:
    context = read(llama)
    true, _ = learn(llama, context)
    monkeypatch.setattr(kernels, "UNKNOWN", ("position_ids",))
    assert torch.equal(learn(llama, read_by_kernels(context))[0], true)


def test_a_step_reads_by_kernels_where_they_fit(model, monkeypatch) -> None:
    decisions = [Decision(tuple(range(9)), (3, 4, 5)), Decision((7, 8, 9), (1, 2))]
    batch = collate(decisions)
    assert not kernels_fit(model)
    true = decision_loss(model, batch, None, 2)
    read = []
    monkeypatch.setattr(step, "kernels_fit", lambda model: True)
    monkeypatch.setattr(step, "read_by_kernels", lambda c: read.append(c) or read_by_kernels(c))
    assert torch.allclose(decision_loss(model, batch, None, 2), true, atol=1e-5)
    assert len(read) == 1


def test_other_attention_is_refused(llama) -> None:
    context = read(llama)
    llama.set_attn_implementation("eager")
    with pytest.raises(ModelNotSupported, match="uses eager"):
        read_by_kernels(replace(context, model=llama))
