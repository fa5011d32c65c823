"""Chooses where task vectors are merged: on a CUDA device, or on the processor.

Both give the same bits, so the choice is no part of a recipe; what was used is noted beside the
result.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vectors.errors import BackendUnavailable, InputError
from vectors.store.checkpoint import Checkpoint
from vectors.tasks.memo import Memo
from vectors.tasks.methods.linear import LinearParameters
from vectors.tasks.methods.ties import TiesParameters
from vectors.tasks.parts import is_float
from vectors.tasks.recipes import Operation
from vectors.tasks.sources import Term
from vectors.tasks.weights import write_weights as write_on_processor
from workbench.merging.crossing import free_bytes, room_for
from workbench.merging.made import Made

if TYPE_CHECKING:
    from workbench.merging.linear import DeviceSum
    from workbench.merging.ties import DeviceTies

__all__ = ["SETTING", "Merging", "refusal"]

SETTING = "WORKBENCH_MERGE_DEVICE"
CHOICES = ("auto", "cpu", "cuda")


class Merging:
    """One merge; `write_weights` chooses, and `made` tells what was chosen.

    Args:
        setting: "auto", "cpu" or "cuda"; the environment's `WORKBENCH_MERGE_DEVICE` if nothing is
            said, and "auto" if that says nothing.

    Raises:
        InputError: another setting.
    """

    def __init__(self, setting: str | None = None) -> None:
        self.setting = setting or os.environ.get(SETTING) or "auto"
        if self.setting not in CHOICES:
            raise InputError(
                f"Weights are merged on {', '.join(CHOICES)}, not on {self.setting[:40]!r}; "
                f"set {SETTING} to one of these."
            )
        self.made: Made | None = None

    def write_weights(
        self,
        checkpoint: Checkpoint,
        terms: Sequence[Term],
        weights: Sequence[float],
        op: Operation,
        folder: Path,
        memo: Memo | None = None,
    ) -> Iterator[str]:
        """Do what `vectors.tasks.weights.write_weights` does, where it is best done.

        Raises:
            BackendUnavailable: "cuda" was asked for, and cannot be.
        """
        start = time.perf_counter()
        why = "asked for" if self.setting == "cpu" else refusal(checkpoint, len(terms), op)
        if why and self.setting == "cuda":
            raise BackendUnavailable(
                f"These weights cannot be merged on a CUDA device: {why}; "
                f"set {SETTING} to auto or cpu."
            )
        merge = None
        if not why:
            try:
                merge = _merge_on_device(checkpoint, terms, weights, op, memo)
            except torch.OutOfMemoryError:
                why = "its memory filled up just now"
        if merge is None:
            yield from write_on_processor(checkpoint, terms, weights, op, folder, memo)
            self.made = Made("cpu", why, seconds=time.perf_counter() - start)
            return
        yield from merge.write(folder)
        self.made = Made(
            torch.cuda.get_device_name(merge.crossing.device),
            held=merge.crossing.held,
            crossed=merge.crossing.crossed,
            seconds=time.perf_counter() - start,
        )


def _merge_on_device(
    checkpoint: Checkpoint,
    terms: Sequence[Term],
    weights: Sequence[float],
    op: Operation,
    memo: Memo | None,
) -> DeviceTies | DeviceSum:
    # Imported late: both import triton.
    from workbench.merging.linear import DeviceSum  # noqa: PLC0415
    from workbench.merging.ties import DeviceTies  # noqa: PLC0415

    device, rule = torch.device("cuda", torch.cuda.current_device()), op.parameters
    if isinstance(rule, TiesParameters):
        return DeviceTies(checkpoint, terms, weights, rule, memo, device)
    return DeviceSum(checkpoint, terms, weights, device)


def refusal(checkpoint: Checkpoint, terms: int, op: Operation) -> str:
    """Return why a merge cannot run on the current CUDA device; "" if it can."""
    if not terms:
        return "nothing is merged"
    if not isinstance(op.parameters, TiesParameters | LinearParameters):
        return f"the method '{op.method}' has no kernels"
    kinds = {slot.dtype for file in checkpoint.files for slot in file.slots if is_float(slot)}
    if kinds != {"BF16"}:
        return f"weights of {', '.join(sorted(kinds)) or 'no known type'} are not BF16"
    if not torch.cuda.is_available():
        return "there is none"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from workbench.merging.ties import THREADS  # noqa: PLC0415  # imports triton

    free = free_bytes(torch.device("cuda", torch.cuda.current_device()))
    if free < room_for(terms, THREADS):
        return f"only {free >> 20} MiB of its memory are free"
    return ""
