"""Kept contexts are the very states that reading afresh gives, until the weights move."""

from __future__ import annotations

import pytest
import torch

from vectors.errors import InputError, ModelNotSupported
from workbench.train import Decision, Lesson, TrainConfig, train
from workbench.train.batches import collate
from workbench.train.contexts import ContextStore, staleness_of
from workbench.train.frozen import freeze_context
from workbench.train.memory import peak_bytes
from workbench.train.modes import training
from workbench.train.step import decision_logits, decision_loss
from workbench.train.tiers import activation_bytes, choose_tier


def batch_of(*lengths: int, decision: int = 4):
    generator = torch.Generator().manual_seed(3)
    found = []
    for length in lengths:
        ids = torch.randint(0, 128, (length + decision,), generator=generator).tolist()
        found.append(Decision(tuple(ids[:length]), tuple(ids[length:])))
    return found, collate(found)


def gradients(model, batch, read):
    with training(model) as weights:
        decision_loss(model, batch, None, 2, read).backward()
        found = {name: p.grad.clone() for name, p in weights.items()}
    return found


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_a_kept_context_is_the_fresh_one(model, place, tmp_path):
    _, batch = batch_of(9, 4, 13)
    store = ContextStore(place, 8, 0.05, tmp_path / "contexts")
    expected = gradients(model, batch, freeze_context)
    for turn in range(3):
        store.step = turn
        found = gradients(model, batch, store)
        for name, gradient in expected.items():
            assert torch.allclose(found[name], gradient, atol=3e-5), name
        use = store.used()
        assert (use.read, use.reused, use.refreshed) == ((3, 0, 0) if turn == 0 else (0, 3, 0))
        assert use.staleness is None
    files = list(tmp_path.glob("contexts/*.safetensors"))
    assert len(files) == (3 if place == "disk" else 0)
    store.clear()
    assert not list(tmp_path.glob("contexts/*.safetensors"))


def test_rows_of_different_steps_join_into_one_batch(model):
    decisions, _ = batch_of(7, 12, 5)
    store = ContextStore("device", 8, 0.05)
    for decision in decisions:
        one = collate([decision])
        store(model, one.context_ids_BP, one.context_mask_BP)
    batch = collate(reversed(decisions))
    with torch.no_grad():
        found = decision_logits(model, batch, 2, store)
        expected = decision_logits(model, batch, 2)
    assert store.used().read == 3
    assert torch.allclose(found, expected, atol=2e-5)


def test_staleness_is_the_relative_difference_and_sets_the_interval(llama):
    _, batch = batch_of(9, 6)
    store = ContextStore("host", 4, 0.05)
    ask = lambda: store(llama, batch.context_ids_BP, batch.context_mask_BP)  # noqa: E731
    ask()
    store.used()
    store.step = 4
    ask()
    use = store.used()
    assert (use.refreshed, use.interval) == (2, 8) and use.staleness == pytest.approx(0, abs=1e-5)
    old = {row: kept.state for row, kept in store._kept.items()}
    with torch.no_grad():
        for parameter in llama.model.layers.parameters():
            parameter.mul_(1.2)
    store.step = 11
    ask()
    assert store.used().reused == 2, "a stale context is used until it is due"
    store.step = 12
    ask()
    use = store.used()
    expected = []
    for row, kept in store._kept.items():
        new = torch.cat([t.double().flatten() for t in kept.state.values()])
        before = torch.cat([t.double().flatten() for t in old[row].values()])
        expected.append(((before - new).norm() / new.norm()).item())
    assert use.staleness == pytest.approx(max(expected)) and max(expected) > 0.05
    assert (use.refreshed, use.interval) == (2, 4)
    state = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    assert staleness_of({"a": torch.zeros(1), "b": torch.zeros(1)}, state) == 1.0


def test_the_interval_grows_no_further_than_contexts_are_kept(llama):
    _, batch = batch_of(9, 6)
    store = ContextStore("host", 3, 0.05, most=5)
    for step in range(1, 40):
        store.step = step
        store(llama, batch.context_ids_BP, batch.context_mask_BP)
        use = store.used()
        assert use.interval <= 5
    assert store.interval == 5 and ContextStore("host", 8, 0.05, most=5).most == 8


def test_training_with_kept_contexts_learns_and_measures(model):
    items, _ = batch_of(9, 4, 13, 6)
    config = TrainConfig(
        learning_rate=2e-3,
        rank=8,
        batch=2,
        passes=8,
        replay=0,
        loss="tokens",
        reuse="host",
        refresh_every=3,
    )
    records = []
    result = train(model, items, None, config, Lesson(items), records.append)
    assert result.tier == 2
    assert result.after.steered < 0.9 * result.before.steered
    uses = [record.contexts for record in records]
    assert sum(use.read for use in uses) == 4 and sum(use.reused for use in uses) > 0
    assert max(use.staleness or 0 for use in uses) > 0


def test_what_cannot_be_kept_is_refused(sliding, llama):
    _, batch = batch_of(9, 6)
    with pytest.raises(ModelNotSupported, match="leave the reuse of contexts off"):
        ContextStore("host", 4, 0.05)(sliding, batch.context_ids_BP, batch.context_mask_BP)
    with pytest.raises(InputError, match="set tier 2"):
        config = TrainConfig(tier=1, reuse="host", loss="tokens", replay=0)
        train(llama, batch_of(9)[0], None, config)


def test_recomputing_gives_the_same_gradient_in_less_memory(model):
    _, batch = batch_of(60, 60, 50, decision=20)
    found, peak = {}, {}
    for tier, recompute in ((1, False), (3, True), (2, False), (2, True)):
        flags = [module.training for module in model.modules()]

        def work(tier=tier):
            decision_loss(model, batch, None, tier).backward()

        with training(model, recompute) as weights:
            peak[tier, recompute] = peak_bytes(work)
            found[tier, recompute] = {n: p.grad.clone() for n, p in weights.items()}
        assert [module.training for module in model.modules()] == flags
        assert not model.is_gradient_checkpointing
    for plain, again in (((1, False), (3, True)), ((2, False), (2, True))):
        for name, gradient in found[plain].items():
            assert torch.allclose(found[again][name], gradient, atol=1e-6), name
        assert peak[again] < 0.8 * peak[plain]
    assert peak[2, False] < 0.6 * peak[1, False]


def test_the_tier_is_picked_by_lengths_and_memory(llama):
    long, _ = batch_of(40, 30, decision=10)
    short, _ = batch_of(4, 5, decision=30)
    assert choose_tier(llama, long, 4, 1 << 40).tier == 2
    chosen = choose_tier(llama, short, 4, 1 << 40)
    assert chosen.tier == 1 and "gradient goes through" in chosen.why
    chosen = choose_tier(llama, short, 4, 1 << 20)
    assert chosen.tier == 3 and "recomputed" in chosen.why
    _, batch = batch_of(60, 60, decision=20)
    with training(llama):
        peak = peak_bytes(lambda: decision_loss(llama, batch, None, 1).backward())
    guess = activation_bytes(llama.config, 160, 40, 4)
    assert peak / 2 < guess < 2 * peak
