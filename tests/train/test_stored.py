"""Trained weights as the checkpoint stores them: its names, its dtypes, its base."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3_5Config, Qwen3_5ForConditionalGeneration

from vectors.errors import ModelNotSupported
from vectors.store import Library
from vectors.tasks import Recipe, materialise
from workbench.models.catalog import describe
from workbench.train.stored import StoredWeights, as_stored


def stored(tuned: torch.Tensor, base: torch.Tensor, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return as_stored(tuned, base, base.to(dtype), torch.Generator().manual_seed(seed))


def test_updates_below_the_spacing_of_bfloat16_survive_on_average():
    base = torch.full((400, 500), 1.0)
    tuned = base + 2**-11  # a sixteenth of the spacing there
    moved = stored(tuned, base, torch.bfloat16, 0).double() - 1
    assert set(moved.unique().tolist()) == {0.0, 2**-7}
    # 200,000 coins of 1/16: five standard errors
    assert moved.mean().item() == pytest.approx(2**-11, rel=5 * (15 / 2e5) ** 0.5)
    assert torch.equal(tuned.bfloat16(), base.bfloat16()), "to nearest, all of it would be lost"
    assert torch.equal(stored(base, base, torch.bfloat16, 0).float(), base)


def test_the_seed_decides_and_other_dtypes_are_only_cast():
    base, tuned = torch.zeros(64, 64), torch.randn(64, 64)
    first = stored(tuned, base, torch.bfloat16, 1)
    assert torch.equal(first, stored(tuned, base, torch.bfloat16, 1))
    assert not torch.equal(first, stored(tuned, base, torch.bfloat16, 2))
    assert torch.equal(stored(tuned, base, torch.float32, 1), tuned)
    learnt = tuned.bfloat16()
    assert torch.equal(stored(learnt, base.bfloat16(), torch.bfloat16, 1), learnt)


@pytest.mark.parametrize("wide", [torch.float32, torch.float16])
def test_what_was_loaded_narrower_keeps_the_digits_on_the_disk(wide: torch.dtype):
    before = (1 + torch.rand(64, 64) / 2).to(wide)
    loaded = before.bfloat16()
    trained = loaded.clone()
    trained[0] += 2**-4
    found = as_stored(trained, loaded, before, torch.Generator())
    assert found.dtype == wide and torch.equal(found[1:], before[1:])
    assert torch.allclose((found[0] - before[0]).float(), torch.tensor(2**-4), atol=2e-3)


@pytest.fixture
def published(hybrid, tmp_path: Path) -> Path:
    """A tiny Qwen3.5 as such checkpoints are published: with a vision tower, `A_log` in float32."""
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
    vision |= {"out_hidden_size": 64, "num_position_embeddings": 16}
    config = Qwen3_5Config(text_config=hybrid.config.to_dict(), vision_config=vision)
    torch.manual_seed(0)
    folder = tmp_path / "published"
    Qwen3_5ForConditionalGeneration(config).bfloat16().save_pretrained(folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    wide = {k: v.float() if k.endswith("A_log") else v for k, v in weights.items()}
    save_file(wide, file, {"format": "pt"})
    return folder


def test_a_published_hybrid_comes_back_as_it_was_trained(published: Path, tmp_path: Path):
    info = describe("published", published)
    model = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32)
    base = copy.deepcopy(model.state_dict())
    own = StoredWeights(info, model)
    for name, weight in model.named_parameters():
        if name in own.names:
            weight.data += 0.01
    trained = {k: v for k, v in model.state_dict().items() if k in own.names}
    before, after = own.before_and_after(trained, base, 0)
    assert all(name.startswith("model.language_model.") for name in after)
    assert {t.dtype for t in after.values()} == {torch.float32, torch.bfloat16}
    library = Library(tmp_path / "library")
    entry = library.save_task("moved", info.base, before, after, info={})
    recipe = Recipe(base=info.base, terms=((entry.digest, 1.0),))
    made = materialise(library, recipe, published, tmp_path / "made")
    again = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32).state_dict()
    for name, weight in trained.items():
        spacing = 2**-7 if own.dtype(name) == torch.bfloat16 else 1e-6
        assert torch.allclose(again[name], weight, rtol=spacing, atol=1e-6), name


def test_what_could_not_be_put_back_is_refused_before_it_is_trained(hybrid, tmp_path: Path):
    folder = tmp_path / "other"
    hybrid.save_pretrained(folder)
    info = describe("other", folder)
    StoredWeights(info, hybrid)
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["fused"] = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ModelNotSupported, match=r"stores the weight 'model.layers.1.mlp.up_proj"):
        StoredWeights(dataclasses.replace(info), hybrid)
