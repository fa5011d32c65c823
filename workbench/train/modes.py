"""The flags of a model while it is read or trained; afterwards they are as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from vectors.errors import ModelNotSupported

__all__ = ["evaluating", "recomputing", "training"]


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put every module of `model` into eval mode."""
    modules = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in modules:
            module.training = True


@contextmanager
def recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Keep only what each decoder layer was given, and compute the rest again for the backward pass.

    Memory falls from every activation to `O(layers * hidden)` for each token, for one more forward
    pass (Chen et al., arXiv:1604.06174).

    Raises:
        ModelNotSupported: the architecture has no layers that can do so.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers or not model.supports_gradient_checkpointing:
        raise ModelNotSupported(
            f"{type(model).__name__} cannot recompute its layers; use tier 1 or 2 without it."
        )
    before = [layer.training for layer in layers]
    was_on = model.is_gradient_checkpointing
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in layers:
        # The layer alone and not its modules: they would begin to drop out.
        layer.training = True
    try:
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer.training = flag
        if not was_on:
            model.gradient_checkpointing_disable()


@contextmanager
def training(model: PreTrainedModel, recompute: bool = False) -> Iterator[dict[str, nn.Parameter]]:
    """Yield the parameters to train, by state name: all but the embedding and the output matrix.

    Only these ask for gradients inside. Dropout stays off: what is learnt is a distribution, and
    noise in the student would be learnt against. Gradients are dropped at the end.

    Args:
        recompute: see `recomputing`.
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    frozen = {id(p) for end in ends if isinstance(end, nn.Module) for p in end.parameters()}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(id(parameter) not in frozen)
    try:
        with evaluating(model), recomputing(model) if recompute else nullcontext():
            yield {name: p for name, p in model.named_parameters() if p.requires_grad}
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
