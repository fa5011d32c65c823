"""Recorded steps move the weights as plain steps do, whatever the shape that they are padded to."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5

from vectors.errors import InputError, ModelNotSupported, RunFailed
from workbench.train import Decision, SoftTargets, TrainConfig, kernels, recorded, train
from workbench.train.batches import collate
from workbench.train.contexts import ContextStore
from workbench.train.factored import factors_of
from workbench.train.frozen import freeze_context
from workbench.train.fused import fused
from workbench.train.modes import training
from workbench.train.optimizers import make_optimizer
from workbench.train.recorded import RecordedSteps
from workbench.train.step import take_step

LENGTHS = [[(9, 5), (4, 3)], [(6, 7), (9, 2)], [(21, 5), (4, 4)], [(9, 5), (4, 3)]]
"""Contexts and decisions of each step; the third falls into another shape."""


@pytest.fixture(autouse=True)
def _small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "PREFIX", 16)
    monkeypatch.setattr(recorded, "WIDTH", 4)


def steps(soft: bool, device: str = "cpu") -> list[tuple[Any, SoftTargets | None]]:
    generator = torch.Generator().manual_seed(7)
    found = []
    for lengths in LENGTHS:
        ids = [torch.randint(0, 128, (c + d,), generator=generator).tolist() for c, d in lengths]
        made = [
            Decision(tuple(row[:c]), tuple(row[c:]))
            for row, (c, _) in zip(ids, lengths, strict=True)
        ]
        target = None
        if soft:
            count = sum(d for _, d in lengths)
            target = SoftTargets.of(torch.randn(count, 128, generator=generator), 8)
            target = SoftTargets.join([target], device)
        found.append((collate(made, device), target))
    return found


def moved(model: Any, soft: bool, record: bool, device: str = "cpu") -> tuple[list[Any], Tensor]:
    start = model.state_dict()
    model = copy.deepcopy(model).to(device)
    numbers = []
    with training(model) as weights:
        config = TrainConfig(rank=8, learning_rate=1e-4)
        optimizer = make_optimizer(weights.values(), config)
        store = ContextStore("device", 2, 1.0)
        fixed = RecordedSteps(model, weights.values(), optimizer, 0.5)
        for number, (batch, target) in enumerate(steps(soft, device)):
            store.step = number
            if record:
                numbers += fixed.take(batch, target, store)
            else:
                numbers += take_step(
                    model, batch, target, list(weights.values()), optimizer, 2, 0.5, store
                )
            assert all(parameter.grad is None for parameter in weights.values())
        assert not record or len(fixed._shapes) == 2
        changes = [w.detach() - start[name].to(device) for name, w in weights.items()]
        return numbers, torch.cat([change.flatten() for change in changes]).cpu()


@pytest.mark.parametrize("soft", [False, True])
def test_weights_are_those_of_plain_steps(model, soft: bool) -> None:
    plain, true = moved(model, soft, record=False)
    found, change = moved(model, soft, record=True)
    assert found == pytest.approx(plain, rel=1e-4)
    assert (change - true).norm() < 1e-2 * true.norm()


@pytest.mark.parametrize(("soft", "few"), [(False, 0), (False, 1000), (True, 1000)])
def test_weights_are_those_of_plain_steps_where_matrices_are_joined(
    model, soft: bool, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels' references and halves that are not compiled stand in where there is no CUDA."""
    plain, true = moved(model, soft, record=False)
    monkeypatch.setattr(modeling_qwen3_5, kernels.RULE, getattr(modeling_qwen3_5, kernels.RULE))
    monkeypatch.setattr(recorded, "kernels_fit", lambda model: True)
    monkeypatch.setattr(recorded, "FEW", few)
    monkeypatch.setattr(recorded, "fused", partial(fused, compiled=lambda function: function))
    found, change = moved(model, soft, record=True)
    assert found == pytest.approx(plain, rel=1e-4)
    assert (change - true).norm() < 1e-2 * true.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("soft", [False, True])
def test_replayed_weights_are_those_of_plain_steps(model, soft: bool) -> None:
    plain, true = moved(model, soft, record=False, device="cuda")
    found, change = moved(model, soft, record=True, device="cuda")
    assert found == pytest.approx(plain, rel=1e-3)
    assert (change - true).norm() < 0.05 * true.norm()


def test_padded_states_are_those_of_the_context_that_was_last_filled_in(model) -> None:
    (first, _), (second, _), *_ = steps(soft=False)
    one, two = (
        freeze_context(model, batch.context_ids_BP, batch.context_mask_BP).cache
        for batch in (first, second)
    )
    own = one.padded(16)
    for cache, lengths in ((two, [5, 8]), (two, [5, 8]), (one, [8, 3])):
        own.fill(cache)
        for found, true in zip(own.rows(lengths), cache.rows(lengths), strict=True):
            assert all(torch.equal(found[name], true[name]) for name in true)


def test_a_run_records_only_where_contexts_are_frozen(llama) -> None:
    made = [Decision(tuple(range(1, 8)), (3, 4)), Decision(tuple(range(9)), (5, 6, 7))]
    settings = {"loss": "tokens", "replay": 0.0, "batch": 1, "rank": 8, "passes": 3}
    results = [
        train(copy.deepcopy(llama), made, None, TrainConfig(**settings, tier=2, recorded=flag))
        for flag in (False, True)
    ]
    plain, found = (torch.cat([w.flatten() for w in r.weights.values()]) for r in results)
    assert torch.allclose(found, plain, atol=1e-5) and results[1].steps == 6
    with pytest.raises(InputError, match="takes tier 1"):
        train(llama, made, None, TrainConfig(**settings, tier=1, recorded=True))


@pytest.mark.parametrize("joined", [False, True])
def test_a_step_that_is_not_finite_moves_nothing(
    llama, joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if joined:
        monkeypatch.setattr(recorded, "kernels_fit", lambda model: True)
        monkeypatch.setattr(recorded, "fused", partial(fused, compiled=lambda function: function))
    (batch, _), *_ = steps(soft=False)
    with training(llama) as weights:
        optimizer = make_optimizer(weights.values(), TrainConfig(rank=8))
        fixed = RecordedSteps(llama, weights.values(), optimizer, 1.0)
        with torch.no_grad():
            next(iter(weights.values()))[0, 0] = torch.inf
        before = [w.detach().clone() for w in weights.values()]
        with pytest.raises(RunFailed, match="The loss is"):
            fixed.take(batch, None)
        assert all(map(torch.equal, before, weights.values()))
        assert all(p.grad is None and factors_of(p) is None for p in weights.values())


def test_a_window_of_the_context_cannot_be_padded(sliding) -> None:
    (batch, _), *_ = steps(soft=False)
    context = freeze_context(sliding, batch.context_ids_BP, batch.context_mask_BP)
    with pytest.raises(ModelNotSupported, match="window"):
        context.cache.padded(32)
