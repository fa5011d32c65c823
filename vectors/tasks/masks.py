"""Random numbers that belong to an element, whatever was drawn before it.

A generator that is read in order ties a mask to the order of tensors, to how they are split, and
to the machine. Here each number is a hash of what it is for, so terms and tensors can come and go.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from vectors.formats.canonical import canonical_json

__all__ = ["uniforms"]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
FIRST = np.uint64(0xBF58476D1CE4E5B9)
SECOND = np.uint64(0x94D049BB133111EB)


def uniforms(seed: int, key: str, name: str, shape: torch.Size) -> Tensor:
    """Return a number in [0, 1) for each element, fp64, a function of the arguments alone.

    SplitMix64 at counter `i`: `mix(sha256([seed, key, name]) + (i + 1) * golden)`, its top 53 bits.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.

    Args:
        key: the task vector that the numbers are for.
        name: the tensor.
    """
    origin = hashlib.sha256(canonical_json([seed, key, name])).digest()[:8]
    z_P = np.arange(1, shape.numel() + 1, dtype=np.uint64)
    z_P *= GOLDEN
    z_P += np.uint64(int.from_bytes(origin, "little"))
    z_P ^= z_P >> np.uint64(30)
    z_P *= FIRST
    z_P ^= z_P >> np.uint64(27)
    z_P *= SECOND
    z_P ^= z_P >> np.uint64(31)
    return torch.from_numpy((z_P >> np.uint64(11)) * 2.0**-53).reshape(shape)
