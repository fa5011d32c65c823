"""The GPU, asked of its driver: torch would take seconds to import, and memory to ask."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from vectors.errors import InputError

__all__ = ["SHARE", "gpu_bytes", "gpu_share", "has_cuda", "share_for"]

SHARE = "WORKBENCH_GPU_SHARE"
# A container may have the device and not the driver's folder in /proc, or the other way round.
SIGNS = ("/proc/driver/nvidia/version", "/dev/nvidiactl")
LEAST, MOST = 0.5, 0.9
NEEDS = 4 << 30


def has_cuda() -> bool:
    """Whether this machine has an NVIDIA driver, asked without loading anything."""
    return any(Path(sign).exists() for sign in SIGNS)


def gpu_bytes() -> int:
    """The memory of the first GPU, or 0 where the driver's own tool does not tell."""
    asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
        return int(told.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 0


def share_for(weights: int, total: int) -> float:
    """Return the share of a GPU that the engine takes: half, so that a run trains beside it.

    vLLM fills whatever it is given with cache, and refuses to start where less is free. A model that
    half a GPU does not hold gets what it needs, up to nine tenths.

    Args:
        weights: bytes of the checkpoint.
        total: bytes of the GPU, 0 where unknown.
    """
    needed = (1.25 * weights + NEEDS) / total if total else LEAST
    return round(min(max(needed, LEAST), MOST), 3)


def gpu_share(weights: int) -> float:
    """The share that `WORKBENCH_GPU_SHARE` names, else the one that `share_for` finds.

    Raises:
        InputError: it names no share of a GPU.
    """
    named = os.environ.get(SHARE, "")
    if not named:
        return share_for(weights, gpu_bytes())
    try:
        share = float(named)
    except ValueError:
        share = 0.0
    if not 0.05 <= share <= 1:
        raise InputError(f"{SHARE} must be a number from 0.05 to 1, not {named[:40]!r}.")
    return share
