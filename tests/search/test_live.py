"""Weights in memory: those of the materialised recipe, and afterwards the base's, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vectors.errors import ModelNotSupported
from vectors.tasks import METHODS, Operation, Recipe, materialise
from workbench.models.loading import load_model
from workbench.search.live import LiveModel


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_the_weights_are_those_of_the_materialised_recipe(
    method: str, searched_home: Any, tmp_path: Path
) -> None:
    info, library = searched_home.model(), searched_home.library
    terms = tuple((library.get(name).digest, w) for name, w in (("glad", 0.7), ("noise", -0.4)))
    recipe = Recipe(op=Operation.of(method, {}), base=info.base, terms=terms)
    folder = materialise(library, recipe, info.folder, tmp_path / "made")
    loaded: Any = load_model(replace(info, folder=folder)).model
    live = LiveModel(info, library, tmp_path)
    before, expected = state(live.model), state(loaded)
    with live.of(recipe) as model:
        inside = state(model)
    assert inside.keys() == expected.keys()
    assert all(torch.equal(inside[name], expected[name]) for name in expected)
    assert any(not torch.equal(inside[name], before[name]) for name in expected)
    assert all(torch.equal(x, before[name]) for name, x in state(live.model).items())
    assert {p.name for p in tmp_path.iterdir()} == {"made", ".workbench-partial.lock"}


def test_the_base_comes_back_after_an_error(searched_home: Any, tmp_path: Path) -> None:
    info, library = searched_home.model(), searched_home.library
    live = LiveModel(info, library, tmp_path)
    before = state(live.model)
    recipe = Recipe(base=info.base, terms=((library.get("glad").digest, 1.0),))
    with pytest.raises(RuntimeError, match="stop"), live.of(recipe):
        raise RuntimeError("stop")
    assert all(torch.equal(x, before[name]) for name, x in state(live.model).items())
    with live.of(Recipe(base=info.base, terms=())) as model:
        assert all(torch.equal(x, before[name]) for name, x in state(model).items())


def test_weights_in_another_form_are_refused(searched_home: Any, tmp_path: Path) -> None:
    info, library = searched_home.model(), searched_home.library
    live = LiveModel(info, library, tmp_path)
    live.model.model.layers[1].mlp.up_proj.weight.data.add_(1)
    before = state(live.model)
    recipe = Recipe(base=info.base, terms=((library.get("glad").digest, 1.0),))
    with pytest.raises(ModelNotSupported, match=r"layers\.1\.mlp\.up_proj"), live.of(recipe):
        pytest.fail("it was used")
    assert all(torch.equal(x, before[name]) for name, x in state(live.model).items())
