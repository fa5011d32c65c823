"""The workbench's own steering-vector file; README.md in this folder specifies it.

Knows nothing about models and the library: bytes in, a checked vector out, and back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, ValidationError
from torch import Tensor

from vectors.errors import InputError, VectorFileError
from vectors.formats.atomic import write_atomic
from vectors.formats.canonical import canonical_json
from vectors.types import SteeringVector

__all__ = ["FORMAT", "read_vector", "vector_bytes", "vector_from_bytes", "write_vector"]

FORMAT = 1
KEY = "workbench"
BIGGEST = 256 << 20  # 128 blocks of width 16384 in fp32 take 8 MB
PICKLES = (b"\x80", b"PK\x03\x04")  # as pickle writes them, and as torch.save does
BLOCK = re.compile(r"block\.(0|[1-9][0-9]{0,4})")

Block = Annotated[int, Field(ge=0, le=99_999)]


class _Metadata(BaseModel):
    """What stands under the key `workbench`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1]
    base: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    best_block: Block
    mean_norms: dict[Block, FiniteFloat]
    info: dict[str, JsonValue]


def vector_bytes(vector: SteeringVector) -> bytes:
    """Return the file of `vector`; equal vectors give equal bytes.

    Raises:
        VectorFileError: a base that is no digest, or information that JSON cannot carry.
    """
    try:
        text = canonical_json(
            {
                "format": FORMAT,
                "base": vector.base,
                "best_block": int(vector.best_block),
                "mean_norms": {str(int(b)): float(norm) for b, norm in vector.mean_norms.items()},
                "info": dict(vector.info),
            },
            "The vector's information",
        )
    except InputError as error:
        raise VectorFileError(str(error)) from error
    _metadata(text.decode(), "The vector")
    tensors = {
        f"block.{int(block)}": v_D.detach().to("cpu", torch.float32).contiguous()
        for block, v_D in vector.directions.items()
    }
    return safetensors.torch.save(tensors, metadata={KEY: text.decode()})


def write_vector(path: Path, vector: SteeringVector) -> None:
    """Write `vector` to `path`, whole or not at all.

    Raises:
        VectorFileError: see `vector_bytes`.
        OutOfSpace: no space, or a folder that cannot be written.
    """
    write_atomic(path, vector_bytes(vector))


def read_vector(path: Path) -> SteeringVector:
    """Read the vector at `path`.

    Raises:
        VectorFileError: no such file, or one that is not a whole and valid vector.
    """
    try:
        size = path.stat().st_size
        if size > BIGGEST:
            raise VectorFileError(
                f"{path} has {size >> 20} MB, far more than a steering vector; check the file."
            )
        data = path.read_bytes()
    except OSError as error:
        raise VectorFileError(
            f"{path} cannot be read ({error.strerror}); name a steering-vector file."
        ) from error
    return vector_from_bytes(data, str(path))


def vector_from_bytes(data: bytes, source: str = "The vector file") -> SteeringVector:
    """Read a vector from the bytes of its file; `source` is what messages call it.

    Raises:
        VectorFileError: bytes that are not a whole and valid vector.
    """
    try:
        safetensors.deserialize(data)
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        # A safetensors file that was cut off may begin like a pickle too, but then has its header.
        if data.startswith(PICKLES) and data[8:9] != b"{":
            raise VectorFileError(
                f"{source} is a Python pickle, which can run code when it is read; "
                "save the vector as safetensors instead."
            ) from error
        raise VectorFileError(
            f"{source} is not a whole safetensors file ({error}); fetch or export it again."
        ) from error
    metadata = _metadata(_header(data).get(KEY), source)
    directions = {_block(name, source): _checked(name, t, source) for name, t in tensors.items()}
    try:
        return SteeringVector(
            base=metadata.base,
            directions=dict(sorted(directions.items())),
            mean_norms=metadata.mean_norms,
            best_block=metadata.best_block,
            info=metadata.info,
        )
    except InputError as error:
        raise VectorFileError(f"{source} cannot be used: {error} Extract it again.") from error


def _header(data: bytes) -> Mapping[str, Any]:
    """The `__metadata__` of a file that safetensors has already checked."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__") or {}


def _metadata(text: str | None, source: str) -> _Metadata:
    if text is None:
        raise VectorFileError(
            f"{source} has no '{KEY}' metadata, so its base and doses are unknown; "
            "import it with the converter for its format."
        )
    try:
        metadata = _Metadata.model_validate_json(text)
    except ValidationError as error:
        row = error.errors(include_url=False)[0]
        raise VectorFileError(
            f"{source} has '{KEY}' metadata that is not valid "
            f"({'.'.join(map(str, row['loc'])) or 'JSON'}: {row['msg']}); "
            "extract or export it again with this version."
        ) from error
    try:
        canonical_json(metadata.info)
    except InputError as error:  # pydantic lets NaN pass inside free JSON
        raise VectorFileError(
            f"{source} has a number in its 'info' that is not finite; export it again without it."
        ) from error
    return metadata


def _block(name: str, source: str) -> int:
    match = BLOCK.fullmatch(name)
    if match is None:
        raise VectorFileError(
            f"{source} has a tensor {name[:60]!r}; a steering vector has only 'block.<number>', "
            "so import it with the converter for its format."
        )
    return int(match[1])


def _checked(name: str, tensor: Tensor, source: str) -> Tensor:
    if tensor.dtype != torch.float32 or not torch.isfinite(tensor).all():
        wrong = (
            "values that are not finite"
            if tensor.dtype == torch.float32
            else f"type {tensor.dtype}"
        )
        raise VectorFileError(
            f"{source} has {wrong} in '{name}'; directions are finite float32, so export it again."
        )
    return tensor
