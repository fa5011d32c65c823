"""One pass over a tensor's bits for what the store needs: byte planes, count, norm.

The reference is `vectors.tasks.delta` (`measure`, `encode_xor`), which this equals to the last bit,
the order of the sums included; it is for bf16, the type that checkpoints mostly have.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["planes_bf16"]

LANES = 1024


@functools.cache
def _compiled() -> Callable[..., int]:
    # numba takes a second to import, and only those who save a task vector need it.
    import numba  # noqa: PLC0415

    compiled: Any = numba.njit(nogil=True, cache=True)(_pass_bf16)
    return compiled


def _pass_bf16(base_P: Any, tuned_P: Any, low_P: Any, high_P: Any, lanes: Any) -> int:
    old, new = np.empty(1, np.uint32), np.empty(1, np.uint32)
    old_f, new_f = old.view(np.float32), new.view(np.float32)
    changed = 0
    for p in range(len(base_P)):
        bits = base_P[p] ^ tuned_P[p]
        low_P[p] = bits & 0xFF
        high_P[p] = bits >> 8
        if bits:
            changed += 1
            old[0] = np.uint32(base_P[p]) << np.uint32(16)
            new[0] = np.uint32(tuned_P[p]) << np.uint32(16)
            difference = np.float64(new_f[0] - old_f[0])
            lanes[p & 1023] += difference * difference
    return changed


def planes_bf16(base_P: np.ndarray, tuned_P: np.ndarray) -> tuple[np.ndarray, int, float | None]:
    """Return the byte planes `[2, P]` of base XOR tuned, elements changed, and the delta's norm.

    Both inputs are bf16 bit patterns as uint16. The norm is None if it is not finite.
    """
    planes_IP = np.empty((2, len(base_P)), np.uint8)
    lanes = np.zeros(LANES)
    changed = int(_compiled()(base_P, tuned_P, planes_IP[0], planes_IP[1], lanes))
    finite = bool(np.isfinite(lanes).all())
    return planes_IP, changed, math.sqrt(math.fsum(lanes)) if finite else None
