"""A model's weights as its checkpoint stores them: under which name, in which dtype.

A checkpoint may hold more than the decoder, under longer names, and weights of several dtypes: published
Qwen3.5 ones have `model.language_model.layers...` and `A_log` in float32. A task vector is exact against
what is on the disk, so it takes names, dtypes and the base from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vectors.errors import ModelNotSupported
from vectors.store.checkpoint import DTYPES, Checkpoint
from workbench.models.catalog import Model
from workbench.train.modes import training
from workbench.train.rounding import stochastic_round

__all__ = ["StoredWeights", "as_stored"]


class StoredWeights:
    """The checkpoint of a loaded model, by the model's own names of what can be trained.

    Raises:
        ModelNotSupported: a weight that the checkpoint does not have like that, so that what is
            learnt could not be put back.
    """

    def __init__(self, info: Model, model: PreTrainedModel) -> None:
        self._checkpoint = Checkpoint(info.folder)
        with training(model) as weights:
            self.names = {name: self._stored_name(info, name, w) for name, w in weights.items()}

    def _stored_name(self, info: Model, name: str, weight: Tensor) -> str:
        for stored in _candidates(name):
            if stored in self._checkpoint:
                slot = self._checkpoint.slot(stored)
                if slot.shape == tuple(weight.shape) and slot.dtype in DTYPES:
                    return stored
        raise ModelNotSupported(
            f"{info.name} stores the weight '{name}' otherwise than it is loaded, so that what is "
            "learnt could not be put back; train a checkpoint whose tensors are the model's own."
        )

    def dtype(self, name: str) -> torch.dtype:
        """The dtype on the disk of what the model calls `name`."""
        return DTYPES[self._checkpoint.slot(self.names[name]).dtype]

    def tensor(self, name: str) -> Tensor:
        """The base on the disk of what the model calls `name`."""
        return self._checkpoint[self.names[name]]

    def before_and_after(
        self, trained: Mapping[str, Tensor], loaded: Mapping[str, Tensor], seed: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Base and trained weights under their names on the disk, in the dtypes there."""
        generator = torch.Generator().manual_seed(seed)
        before, after = {}, {}
        for name, weight in trained.items():
            stored = self.names[name]
            before[stored] = self.tensor(name)
            after[stored] = as_stored(weight, loaded[name], before[stored], generator)
        return before, after


def as_stored(
    trained: Tensor, loaded: Tensor, before: Tensor, generator: torch.Generator
) -> Tensor:
    """A trained weight as the checkpoint stores it.

    Most updates are smaller than the spacing of bfloat16. Rounding to nearest would lose them, and
    with them a sixth of the effect; rounding at random keeps them on average (docs/adr/0009). Where
    the model was loaded in a narrower dtype, its movement is added to what is on the disk.

    Args:
        trained: the weight in the model's dtype.
        loaded: the same before training.
        before: the same on the disk.
    """
    trained, loaded = trained.cpu(), loaded.cpu()
    if not torch.equal(loaded.to(before.dtype), before):
        trained = before.float() + (trained.float() - loaded.float())
    if before.dtype == torch.bfloat16 and trained.dtype == torch.float32:
        return stochastic_round(trained, generator)
    return trained.to(before.dtype)


def _candidates(name: str) -> Iterator[str]:
    """What a checkpoint may call it: as it is, inside a larger model, or without the head's prefix."""
    yield name
    prefix, _, rest = name.partition(".")
    if prefix == "model":
        yield f"model.language_model.{rest}"
        yield f"language_model.model.{rest}"
        yield f"language_model.{rest}"
    yield f"language_model.{name}"
    yield rest
