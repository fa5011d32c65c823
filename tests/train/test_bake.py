"""What baking adds to training: the set's own texts."""

from __future__ import annotations

from workbench.data.contrast import ContrastPair
from workbench.models.loading import load_tokenizer
from workbench.train.sources import _both_sides


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
