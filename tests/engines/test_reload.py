"""Weights are reloaded into the layers inside LoRA wrappers, by the names of the checkpoint."""

from __future__ import annotations

import pytest
from torch import nn

from workbench.engines.vllm.reload import install, unwrapped

pytest.importorskip("vllm", reason="vLLM is not installed on this machine")


class Block(nn.Module):
    """A linear layer that has room for LoRAs, and one that has not."""

    def __init__(self) -> None:
        from vllm.lora.layers import BaseLayerWithLoRA

        super().__init__()
        self.proj = BaseLayerWithLoRA()
        self.proj.base_layer = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(Block(), Block())


def names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def test_inside_the_names_are_those_of_the_checkpoint_and_afterwards_as_before(model):
    before, layers = names(model), dict(model.named_modules())
    assert "0.proj.base_layer.weight" in before
    with unwrapped(model):
        assert "1.proj.weight" in names(model) and not any("base_layer" in n for n in names(model))
        assert model[0].proj is layers["0.proj.base_layer"]
    assert names(model) == before and dict(model.named_modules()) == layers


def test_a_load_that_fails_leaves_the_wrappers_in_their_places(model):
    before = names(model)
    with pytest.raises(KeyError), unwrapped(model):
        raise KeyError("no such tensor")
    assert names(model) == before


def test_a_worker_reloads_inside_and_is_wrapped_once(model):
    seen = []

    class Runner:
        def get_model(self):
            return model

    class Worker:
        model_runner = Runner()

        def reload_weights(self, weights_path):
            seen.append((weights_path, names(model)))

    install(Worker)
    first = Worker.reload_weights
    install(Worker)
    assert Worker.reload_weights is first
    Worker().reload_weights(weights_path="there")
    assert seen == [("there", seen[0][1])] and "0.proj.weight" in seen[0][1]
