"""Contexts that are read once and used by many decisions and steps.

A kept context goes stale as the weights move. It is read again after a number of steps, and how far
the old state was from the fresh one is measured then, and sets that number.

Shape letters: B rows, P context positions.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from vectors.formats.atomic import disk_errors
from workbench.train.cache import FrozenCache, State
from workbench.train.frozen import FrozenContext, freeze_context

__all__ = ["ContextStore", "ContextUse", "staleness_of"]

MOST_STEPS = 1024


@dataclass(frozen=True)
class ContextUse:
    """What became of one step's contexts.

    Args:
        read: contexts read for the first time.
        reused: contexts taken as they were.
        refreshed: contexts that were due and read again.
        staleness: the largest `staleness_of` among the refreshed; None where there is none.
        interval: steps after which a context is due from now on.
    """

    read: int
    reused: int
    refreshed: int
    staleness: float | None
    interval: int


@dataclass
class _Kept:
    step: int
    state: State | Path


def staleness_of(old: State, fresh: State) -> float:
    """Relative difference `||old - fresh|| / ||fresh||` over all keys, values and states."""
    change = sum(float((old[k].double() - fresh[k].double()).square().sum()) for k in fresh)
    size = sum(float(fresh[k].double().square().sum()) for k in fresh)
    return (change / size) ** 0.5 if size else 0.0


class ContextStore:
    """Reads contexts as `freeze_context` does, and keeps what it has read.

    A context is due `interval` steps after it was read. Where a refreshed one was staler than
    `limit`, the interval halves; where all were fresher than a quarter of it, it doubles, up to
    `most`.

    Args:
        place: "device" keeps states beside the model, "host" in main memory, "disk" in `folder`.
        interval: steps to begin with.
        limit: the staleness that is tolerated.
        most: steps to which the interval may grow; contexts that are forgotten before they are due
            are never measured.
        folder: for "disk"; what is in it is deleted.
    """

    def __init__(
        self,
        place: Literal["device", "host", "disk"],
        interval: int,
        limit: float,
        folder: Path | None = None,
        most: int = MOST_STEPS,
    ) -> None:
        self.place, self.interval, self.limit = place, interval, limit
        self.most = max(interval, most)
        self.folder = folder if place == "disk" else None
        self.step = 0
        self._kept: dict[tuple[int, ...], _Kept] = {}
        self._use = ContextUse(0, 0, 0, None, interval)
        self._skeleton: FrozenCache | None = None
        self.clear()

    def clear(self) -> None:
        """Forget all contexts; the interval stays."""
        self._kept.clear()
        if self.folder is not None:
            with disk_errors(self.folder):
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)

    def used(self) -> ContextUse:
        """What became of the contexts since the last time that this was asked."""
        use, self._use = self._use, ContextUse(0, 0, 0, None, self.interval)
        return use

    def __call__(self, model: PreTrainedModel, ids_BP: Tensor, mask_BP: Tensor) -> FrozenContext:
        """Return the state after left-padded contexts, kept ones as they were kept.

        Raises:
            ModelNotSupported: a kind of layer whose state cannot be taken apart by rows.
            OutOfSpace: the folder cannot be written.
        """
        mask_BP = mask_BP.bool()
        rows = [
            tuple(ids[mask].tolist()) for ids, mask in zip(ids_BP.cpu(), mask_BP.cpu(), strict=True)
        ]
        due = [
            row
            for row in dict.fromkeys(rows)
            if row not in self._kept or self.step - self._kept[row].step >= self.interval
        ]
        fresh = self._read(model, due) if due else {}
        self._note(fresh, len(set(rows)) - len(due), model.device)
        for row, state in fresh.items():
            self._kept[row] = _Kept(self.step, self._put(row, state))
        states = [fresh.get(row) or self._get(row, model.device) for row in rows]
        assert self._skeleton is not None
        cache = self._skeleton.with_rows(states)
        width = max(map(len, rows))
        lengths_B = torch.tensor([len(row) for row in rows], device=ids_BP.device)
        return FrozenContext(model, cache, mask_BP[:, mask_BP.shape[1] - width :], lengths_B)

    def _read(
        self, model: PreTrainedModel, rows: list[tuple[int, ...]]
    ) -> dict[tuple[int, ...], State]:
        width = max(map(len, rows))
        device = model.device
        ids_BP = torch.stack([F.pad(torch.tensor(row), (width - len(row), 0)) for row in rows]).to(
            device
        )
        lengths_B = torch.tensor([len(row) for row in rows], device=device)
        mask_BP = torch.arange(width, device=device) >= (width - lengths_B)[:, None]
        cache = freeze_context(model, ids_BP, mask_BP).cache
        states = cache.rows([len(row) for row in rows])
        self._skeleton = cache.skeleton()
        return dict(zip(rows, states, strict=True))

    def _note(self, fresh: dict[tuple[int, ...], State], reused: int, device: torch.device) -> None:
        again = [row for row in fresh if row in self._kept]
        stale = [staleness_of(self._get(row, device), fresh[row]) for row in again]
        if stale and max(stale) > self.limit:
            self.interval = max(1, self.interval // 2)
        elif stale and max(stale) < self.limit / 4:
            self.interval = min(self.most, self.interval * 2)
        before = self._use
        worst = [*stale, *([] if before.staleness is None else [before.staleness])]
        self._use = ContextUse(
            before.read + len(fresh) - len(again),
            before.reused + reused,
            before.refreshed + len(again),
            max(worst, default=None),
            self.interval,
        )

    def _put(self, row: tuple[int, ...], state: State) -> State | Path:
        if self.place == "device":
            return state
        host = {name: tensor.to("cpu") for name, tensor in state.items()}
        if self.folder is None:
            pinned = torch.cuda.is_available()
            return {name: t.pin_memory() for name, t in host.items()} if pinned else host
        path = self.folder / f"{hashlib.sha256(repr(row).encode()).hexdigest()}.safetensors"
        with disk_errors(path):
            save_file({name: t.contiguous() for name, t in host.items()}, path)
        return path

    def _get(self, row: tuple[int, ...], device: torch.device) -> State:
        state = self._kept[row].state
        if isinstance(state, Path):
            return load_file(state, device=str(device))
        return {name: tensor.to(device, non_blocking=True) for name, tensor in state.items()}
