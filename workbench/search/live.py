"""A model in memory whose weights become those of a recipe, and exactly the base's again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vectors.errors import ModelNotSupported
from vectors.store import Library
from vectors.store.checkpoint import Checkpoint
from vectors.tasks import Recipe
from vectors.tasks.weights import changed_tensors
from workbench.merging.choose import Merging
from workbench.models.catalog import Model
from workbench.models.loading import load_model

__all__ = ["LiveModel"]


class LiveModel:
    """The base `info`, loaded once.

    Args:
        info: the base on the disk.
        library: where recipes find their task vectors.
        scratch: a folder for what does not fit into memory while it is merged.
    """

    def __init__(self, info: Model, library: Library, scratch: Path) -> None:
        self.info, self.library, self.scratch = info, library, scratch
        loaded = load_model(info)
        self.model: Any = loaded.model
        self.tokenizer: Any = loaded.tokenizer
        self._checkpoint = Checkpoint(info.folder)
        self._places: dict[str, Tensor] = {
            **dict(self.model.named_buffers(remove_duplicate=False)),
            **dict(self.model.named_parameters(remove_duplicate=False)),
        }
        self._proven: set[str] = set()

    @contextmanager
    def of(self, recipe: Recipe) -> Iterator[Any]:
        """The model with the recipe's weights while inside, and the base's afterwards.

        The weights are those that a load of the materialised recipe gives: merged, rounded to the
        checkpoint's type, then cast to the model's.

        Raises:
            NameNotFound, ModelMismatch, ShapeMismatch, InputError: see `changed_tensors`.
            ModelNotSupported: a tensor that transformers keeps in another form than the checkpoint.
        """
        changed: list[str] = []
        write = Merging().write_weights
        tensors = changed_tensors(self.library, recipe, self.info.folder, self.scratch, write)
        try:
            for name, tensor in tensors if recipe.terms else ():
                self._prove(name)
                changed.append(name)
                self._put(name, tensor)
            yield self.model
        finally:
            for name in changed:
                self._put(name, self._checkpoint[name])

    @torch.no_grad()
    def _put(self, name: str, tensor: Tensor) -> None:
        self._places[name].copy_(tensor)

    def _prove(self, name: str) -> None:
        """Refuse a tensor that could not be put back from the checkpoint, bit for bit."""
        if name in self._proven:
            return
        place = self._places.get(name)
        base = self._checkpoint[name]
        if (
            place is None
            or place.shape != base.shape
            or not torch.equal(place, base.to(place.device, place.dtype))
        ):
            raise ModelNotSupported(
                f"transformers keeps '{name}' of {self.info.name} in another form than its "
                "checkpoint, so that it cannot be changed in memory; try weights one by one with "
                "'generate --with'."
            )
        self._proven.add(name)
