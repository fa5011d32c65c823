"""New weights in place in an engine that has LoRA slots.

A linear layer with room for LoRAs lies inside a wrapper, and its weight has another name than in the
checkpoint. vLLM 0.25.1 does not find it then, and leaves a model without weights. While weights are
reloaded the layers take their wrappers' places, so that the model is the one that was loaded first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["install", "unwrapped"]


def install(worker: Any) -> None:
    """Wrap `reload_weights` of a class of workers, once."""
    original = worker.reload_weights
    if getattr(original, "workbench", False):
        return

    @functools.wraps(original)
    def reload_weights(self: Any, *args: Any, **kw: Any) -> Any:
        with unwrapped(self.model_runner.get_model()):
            return original(self, *args, **kw)

    reload_weights.workbench = True  # type: ignore[attr-defined]
    worker.reload_weights = reload_weights


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[None]:
    """Put the layers of `model` in the places of their LoRA wrappers while inside."""
    from vllm.lora.layers import BaseLayerWithLoRA  # noqa: PLC0415  # vLLM is loaded here

    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, BaseLayerWithLoRA)
    ]
    try:
        for parent, name, child in wrapped:
            parent._modules[name] = child.base_layer
        yield
    finally:
        for parent, name, child in wrapped:
            parent._modules[name] = child
