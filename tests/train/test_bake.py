"""What baking adds to training: the set's own texts, and weights as the checkpoint stores them."""

from __future__ import annotations

import pytest
import torch

from workbench.data.contrast import ContrastPair
from workbench.models.loading import load_tokenizer
from workbench.train.bake import _stored
from workbench.train.sources import _both_sides


def test_updates_below_the_spacing_of_bfloat16_survive_on_average():
    base = torch.full((400, 500), 1.0)
    tuned = base + 2**-11  # a sixteenth of the spacing there
    kept = _stored({"w": tuned, "still": base}, torch.bfloat16, 0)
    moved = kept["w"].double() - 1
    assert set(moved.unique().tolist()) == {0.0, 2**-7}
    # 200,000 coins of 1/16: five standard errors
    assert moved.mean().item() == pytest.approx(2**-11, rel=5 * (15 / 2e5) ** 0.5)
    assert torch.equal(tuned.bfloat16(), base.bfloat16()), "to nearest, all of it would be lost"
    assert torch.equal(kept["still"].float(), base)


def test_the_seed_decides_and_other_dtypes_are_only_cast():
    tuned = {"w": torch.randn(64, 64)}
    first = _stored(tuned, torch.bfloat16, 1)["w"]
    assert torch.equal(first, _stored(tuned, torch.bfloat16, 1)["w"])
    assert not torch.equal(first, _stored(tuned, torch.bfloat16, 2)["w"])
    assert torch.equal(_stored(tuned, torch.float32, 1)["w"], tuned["w"])
    learnt = {"w": torch.randn(64, 64).bfloat16()}
    assert torch.equal(_stored(learnt, torch.bfloat16, 1)["w"], learnt["w"])


def test_both_sides_of_each_pair_are_read_to_their_end(tiny):
    tokenizer = load_tokenizer(tiny)
    pairs = [
        ContrastPair(prompt=f"What now, {i}?", positive="Good!", negative="Bad.") for i in (0, 1)
    ]
    found = _both_sides(tokenizer, pairs)
    texts = [tokenizer.decode(d.decision_ids, skip_special_tokens=True) for d in found]
    assert texts == ["Good!", "Bad."] * 2
    assert {d.decision_ids[-1] for d in found} == {tokenizer.eos_token_id}
    assert {d.kind for d in found} == {"steered"}
    assert "What now, 1?" in tokenizer.decode(found[-1].context_ids)
