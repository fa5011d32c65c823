"""The flags of a model while it is read or trained; afterwards they are as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

__all__ = ["evaluating", "training"]


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
def training(model: PreTrainedModel) -> Iterator[dict[str, nn.Parameter]]:
    """Yield the parameters to train, by state name: all but the embedding and the output matrix.

    Only these ask for gradients inside. Dropout stays off: what is learnt is a distribution, and
    noise in the student would be learnt against. Gradients are dropped at the end.
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    frozen = {id(p) for end in ends if isinstance(end, nn.Module) for p in end.parameters()}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(id(parameter) not in frozen)
    try:
        with evaluating(model):
            yield {name: p for name, p in model.named_parameters() if p.requires_grad}
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
