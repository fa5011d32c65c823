"""What a training leaves in the library: task vectors, with everything that led to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vectors.store import Entry, Library
from workbench.models.catalog import Model
from workbench.settings import package_version
from workbench.train.stored import StoredWeights

__all__ = ["Keeper"]

PACKAGES = ("torch", "transformers", "steering-workbench")


@dataclass(frozen=True)
class Keeper:
    """Keeps weights of one training.

    Args:
        info: the base on the disk, whose tensors are `stored`.
        base: the same as the training began with.
        about: JSON: what is true of the training, whichever step the weights are of.
        files: attachments by name.
        parents: digests that the task vectors come from.
    """

    library: Library
    info: Model
    stored: StoredWeights
    base: Mapping[str, Tensor]
    seed: int
    about: Mapping[str, Any]
    files: Mapping[str, bytes]
    parents: Sequence[str]

    def keep(self, name: str, weights: Mapping[str, Tensor], step: int) -> tuple[Entry, float]:
        """Keep the weights of one step as `name`; return the entry and the share that changed."""
        before, tuned = self.stored.before_and_after(weights, self.base, self.seed)
        changed = sum(int((tuned[k] != before[k]).sum()) for k in tuned)
        share = changed / sum(t.numel() for t in before.values())
        about = {**self.about, "kept_step": step, "changed_share": share}
        about["versions"] = {package: package_version(package) for package in PACKAGES}
        entry = self.library.save_task(
            name,
            self.info.base,
            before,
            tuned,
            info={"model": self.info.name, **about},
            files=self.files,
            parents=self.parents,
        )
        return entry, share
