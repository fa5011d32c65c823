"""Persona-vector tensors: one tensor `[n_layers + 1, D]`, row `i` read at `hidden_states[i]`.

`hidden_states[0]` is the embedding, so row `i` is the output of decoder block `i - 1`, and the
project's "layer L" hooks block `L - 1`: block `b` is row `b + 1`. Row 0 belongs to no block.

The project itself keeps `.pt` files, which are pickles. They are read only by the format's own
name, by PyTorch's restricted unpickler, and never written.

Shape letters: L rows, D width.
"""

from __future__ import annotations

import io
import pickle
import zipfile

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from vectors.errors import VectorFileError
from vectors.formats.foreign import BIGGEST, Calibration, Foreign, additions, foreign
from vectors.types import SteeringVector

__all__ = [
    "PERSONA",
    "PERSONA_PT",
    "is_persona",
    "persona_bytes",
    "read_persona",
    "read_persona_pt",
]

PERSONA, PERSONA_PT = "persona", "persona-pt"
NAME = "persona_vectors"
KEY = "workbench-persona"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read_persona(data: bytes, source: str, metadata: dict[str, str] | None = None) -> Foreign:
    """Read the one tensor of a safetensors file as persona vectors.

    Args:
        metadata: the file's `__metadata__`.

    Raises:
        VectorFileError: not a whole safetensors file, or not one tensor `[n_layers + 1, D]`.
    """
    try:
        safetensors.deserialize(data)
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise VectorFileError(
            f"{source} is not a whole safetensors file ({error}); fetch or export it again."
        ) from error
    if len(tensors) != 1:
        raise VectorFileError(
            f"{source} has {len(tensors)} tensors; persona vectors are one tensor "
            "[n_layers + 1, D], so check the format."
        )
    text = (metadata or {}).get(KEY)
    carried = None if text is None else Calibration.read(text)
    return _read(PERSONA, next(iter(tensors.values())), source, carried)


def read_persona_pt(data: bytes, source: str) -> Foreign:
    """Read a `.pt` file that holds one tensor, by the unpickler that makes nothing but tensors.

    Raises:
        VectorFileError: not such a file, one that needs more than tensors, or an oversized one.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise VectorFileError(
            f"{source} is not a .pt file of a current PyTorch; load it there and save it again."
        ) from error
    # torch.save stores its parts as they are; a packed one could unfold to any size.
    unfolded = sum(entry.file_size for entry in entries)
    if unfolded > BIGGEST or any(e.compress_type != zipfile.ZIP_STORED for e in entries):
        raise VectorFileError(
            f"{source} is packed or unfolds to {unfolded >> 20} MB, which torch.save does not do; "
            "save the tensor again."
        )
    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, ValueError, KeyError, EOFError, TypeError,
            AttributeError, IndexError, AssertionError) as error:  # fmt: skip
        first = (str(error).splitlines() or [""])[0][:120]
        raise VectorFileError(
            f"{source} cannot be read as a tensor alone ({first}); load it where you trust it and "
            "save the tensor as safetensors."
        ) from error
    if not isinstance(found, Tensor):
        raise VectorFileError(
            f"{source} holds a {type(found).__name__}, not one tensor [n_layers + 1, D]; save the "
            "tensor as safetensors."
        )
    return _read(PERSONA_PT, found, source)


def persona_bytes(vector: SteeringVector) -> bytes:
    """Return a safetensors file with one tensor `[n_layers + 1, D]`; its strength is our dose.

    Row 0, and rows of blocks that the vector has no direction for, are 0 and steer nothing.
    """
    rows_LD = torch.zeros(max(vector.directions) + 2, vector.width)
    for block, v_D in additions(vector, sorted(vector.directions)).items():
        rows_LD[block + 1] = v_D
    # One key: safetensors writes several in no fixed order, and equal vectors are equal bytes.
    return safetensors.torch.save({NAME: rows_LD}, metadata={KEY: Calibration.of(vector).text()})


def is_persona(metadata: dict[str, str]) -> bool:
    """Whether the `__metadata__` of a safetensors file says that it holds persona vectors."""
    return KEY in metadata


def _read(format: str, rows_LD: Tensor, source: str, carried: Calibration | None = None) -> Foreign:
    plain = rows_LD.layout is torch.strided and rows_LD.dtype in FLOATS
    if not plain or rows_LD.dim() != 2 or rows_LD.shape[0] < 2:
        raise VectorFileError(
            f"{source} holds a tensor of {rows_LD.dtype} {list(rows_LD.shape)}; persona vectors are "
            "floats [n_layers + 1, D]."
        )
    if rows_LD.numel() * 4 > BIGGEST:  # a view can claim more than its bytes
        raise VectorFileError(f"{source} is far larger than a steering vector; check the file.")
    layers = rows_LD.shape[0] - 1
    notes = ("Left out row 0, which was read at the embedding.",) if rows_LD[0].any() else ()
    rows = {block: rows_LD[block + 1] for block in range(layers)}
    return foreign(format, rows, source, layers=layers, carried=carried, notes=notes)
