"""A base and its fine-tunes in a folder, merged by TIES on the processor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vectors.store import Checkpoint
from vectors.tasks.memo import FolderMemo
from vectors.tasks.recipes import Operation
from vectors.tasks.sources import FolderTerm
from vectors.tasks.weights import write_weights

__all__ = ["Merges", "State"]

State = dict[str, torch.Tensor]


class Merges:
    """The files, and what merging some of them by their `weights` writes."""

    def __init__(
        self, folder: Path, base: State, tuned: dict[str, State], weights: Mapping[str, float]
    ) -> None:
        self.folder, self.base, self.tuned, self.weights = folder, base, tuned, weights
        for name, state in {"base": base, **tuned}.items():
            (folder / name).mkdir()
            save_file(state, folder / name / "model.safetensors")
        self.checkpoint = Checkpoint(folder / "base")

    def terms(self, keys: str) -> list[FolderTerm]:
        return [FolderTerm(k, self.folder / k, self.checkpoint) for k in keys]

    def new_folder(self) -> Path:
        out = self.folder / f"out-{len(list(self.folder.iterdir()))}"
        out.mkdir()
        return out

    def write(self, keys: str, memo: FolderMemo | None = None, **options: Any) -> State:
        out = self.new_folder()
        op, weights = Operation.of("ties", options), [self.weights[k] for k in keys]
        names = list(write_weights(self.checkpoint, self.terms(keys), weights, op, out, memo))
        assert sorted(names) == sorted(self.base)
        return load_file(out / "model.safetensors")
