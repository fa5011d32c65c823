"""Reference: captured activations against `output_hidden_states`, one sample at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vectors.errors import InputError, ModelNotSupported
from workbench.data.templates import Sample, sample
from workbench.models.blocks import decoder_blocks
from workbench.models.capture import block_means
from workbench.models.loading import load_model

SAMPLES = [
    Sample((1, 2, 3, 10, 11), (20, 21, 22)),
    Sample((1, 2, 3, 10), (20,)),
    Sample((1, 2, 3, 12, 13, 14, 15), tuple(range(30, 47))),
    Sample((1, 2, 3, 10, 11), (25, 26)),
]


@pytest.fixture(scope="module")
def loaded(tiny):
    return load_model(tiny)


@pytest.mark.parametrize("position", ["completion-mean", "last", "prompt-last"])
def test_means_are_those_of_hidden_states(loaded, position):
    means_LND, norms_LN = block_means(loaded.model, SAMPLES, position)
    assert means_LND.shape == (4, len(SAMPLES), 64)
    for n, s in enumerate(SAMPLES):
        with torch.no_grad():
            out = loaded.model(
                torch.tensor([[*s.context, *s.completion]]), output_hidden_states=True
            )
        start = len(s.context)
        where = {"completion-mean": slice(start, None), "last": slice(-1, None)}.get(
            position, slice(start - 1, start)
        )
        # hidden_states[b + 1] is block b's output, but for the last block, whose entry is normed.
        for block in range(3):
            h_TD = out.hidden_states[block + 1][0].float()
            torch.testing.assert_close(
                means_LND[block, n], h_TD[where].mean(0), rtol=1e-4, atol=1e-4
            )
            norm = h_TD[start:].norm(dim=-1).mean()
            torch.testing.assert_close(norms_LN[block, n], norm, rtol=1e-4, atol=1e-4)


def test_the_last_block_is_read_before_the_final_norm(loaded):
    means_LND, _ = block_means(loaded.model, SAMPLES, "last")
    s = SAMPLES[0]
    with torch.no_grad():
        out = loaded.model(torch.tensor([[*s.context, *s.completion]]), output_hidden_states=True)
        normed = loaded.model.model.norm(means_LND[3, 0])
    torch.testing.assert_close(normed, out.hidden_states[4][0, -1], rtol=1e-3, atol=1e-3)


def test_hooks_are_gone_afterwards_and_bad_positions_refused(loaded):
    blocks = decoder_blocks(loaded.model)
    before = [list(block._forward_hooks) for block in blocks]
    block_means(loaded.model, SAMPLES[:1])
    assert [list(block._forward_hooks) for block in blocks] == before
    with pytest.raises(InputError, match="position"):
        block_means(loaded.model, SAMPLES, "middle")  # type: ignore[arg-type]


def test_blocks_are_found_by_structure(loaded):
    assert len(decoder_blocks(loaded.model)) == 4
    with pytest.raises(ModelNotSupported, match="no list of decoder layers"):
        decoder_blocks(nn.Linear(2, 2))


def test_templates_end_where_the_assistant_begins(loaded):
    made = sample(loaded.tokenizer, "hello", "world")
    text = loaded.tokenizer.decode([*made.context, *made.completion])
    assert text == "<|user|>hello<|end|><|assistant|>world"
