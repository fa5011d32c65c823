"""The exact difference between two tensors of one shape and dtype.

A delta kept in bf16 restores only 96.7 % of the weights; the XOR of the bit patterns restores all.
Fine-tuning leaves sign and exponent of most weights alone, so the XOR's high bytes are nearly all
zero; kept apart from the low bytes ("planes"), they compress to almost nothing.

Shape letters: P elements, I bytes of an element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import zstandard
from torch import Tensor

from vectors.errors import ShapeMismatch, StoreCorrupt

__all__ = [
    "Change",
    "check_alike",
    "decode_xor",
    "delta",
    "encode_xor",
    "measure",
    "raw_bytes",
    "raw_view",
]

LEVEL = 3
LANES = 1024
PART = LANES * LANES  # elements at a time, so that what is computed on the way stays small
_INTEGERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Change:
    """How far a tensor moved: norm of its delta (None if not finite) and elements changed."""

    norm: float | None
    changed: int


def delta(base: Tensor, tuned: Tensor) -> Tensor:
    """Return `tuned - base` in fp32; exactly 0 wherever the bits are equal, infinities included.

    fp64 is subtracted before it is rounded, so that a small change of a large weight is seen.

    Raises:
        ShapeMismatch: the shapes or dtypes differ.
    """
    check_alike(base, tuned)
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    difference = (tuned.detach().cpu().to(wide) - base.detach().cpu().to(wide)).float()
    if not math.isfinite(difference.sum()):
        equal = torch.from_numpy(_bits(base) == _bits(tuned)).reshape(base.shape)
        difference.masked_fill_(equal, 0.0)
    return difference


def measure(base: Tensor, tuned: Tensor) -> Change:
    """Return the Frobenius norm of the delta and the number of elements whose bits differ.

    Raises:
        ShapeMismatch: the shapes or dtypes differ.
    """
    check_alike(base, tuned)
    changed, lanes = 0, np.zeros(LANES)
    base_P, tuned_P = base.detach().reshape(-1), tuned.detach().reshape(-1)
    for start in range(0, base.numel(), PART):
        old, new = base_P[start : start + PART], tuned_P[start : start + PART]
        changed += int(np.count_nonzero(_bits(old) != _bits(new)))
        _add_squares(lanes, delta(old, new).numpy())
    finite = bool(np.isfinite(lanes).all())
    return Change(math.sqrt(math.fsum(lanes)) if finite else None, changed)


def encode_xor(base: Tensor, tuned: Tensor) -> bytes:
    """Return `zstd(planes(bits(base) XOR bits(tuned)))`, the payload of an "xor" tensor.

    Raises:
        ShapeMismatch: the shapes or dtypes differ.
    """
    check_alike(base, tuned)
    xor_PI = (_bits(base) ^ _bits(tuned)).view(np.uint8).reshape(-1, base.element_size())
    return zstandard.ZstdCompressor(level=LEVEL).compress(np.ascontiguousarray(xor_PI.T).data)


def decode_xor(base: Tensor, payload: bytes) -> Tensor:
    """Return the tensor whose difference from `base` is `payload`, bit for bit.

    Raises:
        StoreCorrupt: a payload that is damaged or was made for a tensor of another size.
    """
    try:
        size = zstandard.get_frame_parameters(payload).content_size
        # Asked before decompressing: a damaged length must not fill the memory.
        if size != base.nbytes:
            raise StoreCorrupt(
                f"A task tensor's payload holds {size} bytes where the base's tensor has "
                f"{base.nbytes}; use the base that it was made for."
            )
        planes = zstandard.ZstdDecompressor().decompress(
            payload, max_output_size=base.nbytes, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise StoreCorrupt(
            f"A task tensor's payload cannot be decompressed ({error}); "
            "fetch the task vector again."
        ) from error
    xor_IP = np.frombuffer(planes, np.uint8).reshape(base.element_size(), -1)
    # On the CPU whatever the default device is: the bits are written through shared memory.
    tuned = torch.empty(base.shape, dtype=base.dtype, device="cpu")
    bits_P = _bits(tuned)
    bits_P.view(np.uint8).reshape(-1, base.element_size())[:] = xor_IP.T
    bits_P ^= _bits(base)
    return tuned


def raw_bytes(tensor: Tensor) -> bytes:
    """Return the elements as they stand in a safetensors file: row-major, little-endian."""
    return _bits(tensor).tobytes()


def raw_view(tensor: Tensor) -> np.ndarray:
    """Return the same bytes as an array of uint8; shares memory where `tensor` is contiguous."""
    flat = tensor.detach().cpu().contiguous()
    # A tensor of at most one element counts as contiguous whatever its strides are, and a view of
    # another type needs a stride of 1.
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy()


def check_alike(base: Tensor, tuned: Tensor) -> None:
    """Raise ShapeMismatch unless the two have one shape and one dtype."""
    if base.shape != tuned.shape or base.dtype != tuned.dtype:
        raise ShapeMismatch(
            f"The tuned tensor is {tuned.dtype} {list(tuned.shape)} and the base's is {base.dtype} "
            f"{list(base.shape)}; a task vector needs the same shape and type, so cast it first."
        )


def _bits(tensor: Tensor) -> np.ndarray:
    """The bit patterns as unsigned integers, `[P]`; shares memory where `tensor` is contiguous."""
    return raw_view(tensor).view(_INTEGERS[tensor.element_size()])


def _add_squares(lanes: np.ndarray, x_P: np.ndarray) -> None:
    """Add `x^2` to the lanes in one fixed order.

    The norm is part of a task vector's identity, so it must not depend on threads or vector units.
    Squares of fp32 are exact in fp64, each lane adds its rows one by one, and `fsum` is exact.
    """
    x_P = np.pad(x_P.astype(np.float64), (0, -len(x_P) % LANES))
    for row in (x_P * x_P).reshape(-1, LANES):
        lanes += row
