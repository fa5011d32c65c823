"""The weights of a Hugging Face checkpoint folder, byte by byte or a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vectors.errors import ModelNotSupported

__all__ = [
    "DTYPES",
    "INDEX",
    "SINGLE",
    "Checkpoint",
    "Slot",
    "WeightFile",
    "dtype_name",
    "weight_files",
]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def dtype_name(dtype: torch.dtype) -> str:
    """Return safetensors' name of a dtype, such as `BF16`.

    Raises:
        ModelNotSupported: a dtype that checkpoints do not have.
    """
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise ModelNotSupported(f"Weights of type {dtype} cannot be kept; use {', '.join(DTYPES)}.")


@dataclass(frozen=True)
class Slot:
    """Where one tensor's bytes stand in its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file: its header as it is, and its tensors in the order of their bytes."""

    path: Path
    header: bytes
    slots: tuple[Slot, ...]


class _Index(BaseModel):
    weight_map: dict[str, str]


def weight_files(folder: Path) -> tuple[WeightFile, ...]:
    """Return the weight files of a checkpoint: the single file, or the shards of the index.

    Raises:
        ModelNotSupported: no weights, or files that are missing, damaged or contradict each other.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return (_weight_file(folder / SINGLE),)
    if not index.is_file():
        raise ModelNotSupported(
            f"{folder} has neither {SINGLE} nor {INDEX}; "
            "name a folder with a safetensors checkpoint."
        )
    try:
        where = _Index.model_validate_json(index.read_bytes()).weight_map
    except (OSError, ValidationError) as error:
        raise ModelNotSupported(
            f"{index} is not a valid index; download the model again."
        ) from error
    shards = sorted(set(where.values()))
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelNotSupported(
                f"{index} names {shard[:80]!r}, which is no safetensors file beside it; "
                "download the model again."
            )
    files = tuple(_weight_file(folder / shard) for shard in shards)
    found = [slot.name for file in files for slot in file.slots]
    if len(set(found)) != len(found) or not where.keys() <= set(found):
        raise ModelNotSupported(
            f"The shards in {folder} do not hold each tensor of {INDEX} once; "
            "download the model again."
        )
    return files


def _weight_file(path: Path) -> WeightFile:
    try:
        # safetensors checks the header and the length; reading it again keeps its exact bytes.
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            prefix = file.read(8)
            text = file.read(int.from_bytes(prefix, "little"))
    except (OSError, SafetensorError) as error:
        raise ModelNotSupported(
            f"{path} is not a whole safetensors file ({error}); download the model again."
        ) from error
    rows: dict[str, Any] = json.loads(text)
    rows.pop("__metadata__", None)
    origin = len(prefix) + len(text)
    slots = [
        Slot(name, row["dtype"], tuple(row["shape"]), *(origin + o for o in row["data_offsets"]))
        for name, row in rows.items()
    ]
    return WeightFile(path, prefix + text, tuple(sorted(slots, key=lambda s: (s.start, s.end))))


class Checkpoint(Mapping[str, Tensor]):
    """A checkpoint folder as a mapping from name to tensor; each look-up reads one tensor.

    Raises:
        ModelNotSupported: see `weight_files`.
    """

    def __init__(self, folder: Path) -> None:
        self.files = weight_files(folder)
        self._where = {slot.name: (file, slot) for file in self.files for slot in file.slots}

    def __getitem__(self, name: str) -> Tensor:
        file, slot = self._where[name]
        if slot.dtype not in DTYPES:
            raise ModelNotSupported(
                f"'{name}' in {file.path} has type {slot.dtype}, which cannot be computed with; "
                "use an unquantised checkpoint."
            )
        raw = self.read(name)
        if not raw:
            return torch.empty(slot.shape, dtype=DTYPES[slot.dtype])
        return torch.frombuffer(raw, dtype=DTYPES[slot.dtype]).reshape(slot.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def read(self, name: str) -> bytearray:
        """Return the tensor's bytes as they stand in the file."""
        file, slot = self._where[name]
        raw = bytearray(slot.end - slot.start)
        with file.path.open("rb") as opened:
            opened.seek(slot.start)
            if opened.readinto(raw) != len(raw):
                raise ModelNotSupported(f"{file.path} ended too early; download the model again.")
        return raw

    def slot(self, name: str) -> Slot:
        """Return where and what the tensor is."""
        return self._where[name][1]
