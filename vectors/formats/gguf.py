"""The GGUF container: metadata and fp32 tensors, read strictly from bytes and written to bytes.

The format is llama.cpp's (its `docs/gguf.md`, versions 2 and 3). The usual library maps a file and
believes every count in it; here a count that the file cannot hold ends the reading at once.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vectors.errors import VectorFileError

__all__ = ["MAGIC", "Gguf", "Kind", "read_gguf", "write_gguf"]

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
F32 = 0


class Kind(IntEnum):
    """The types of metadata values."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_SCALARS = {
    Kind.UINT8: "<B",
    Kind.INT8: "<b",
    Kind.UINT16: "<H",
    Kind.INT16: "<h",
    Kind.UINT32: "<I",
    Kind.INT32: "<i",
    Kind.FLOAT32: "<f",
    Kind.BOOL: "<?",
    Kind.UINT64: "<Q",
    Kind.INT64: "<q",
    Kind.FLOAT64: "<d",
}
_LENGTH = "<Q"


@dataclass(frozen=True)
class Gguf:
    """What a file holds: values, their types, and tensors in the file's order."""

    metadata: Mapping[str, Any]
    kinds: Mapping[str, Kind]
    tensors: Mapping[str, Tensor]


def read_gguf(data: bytes, source: str = "The GGUF file") -> Gguf:
    """Read a file whose tensors are all fp32.

    Raises:
        VectorFileError: bytes that are not a whole and valid file of that kind.
    """
    cursor = _Cursor(data, source)
    if cursor.take(4) != MAGIC:
        raise VectorFileError(f"{source} is not a GGUF file; check its format.")
    version = cursor.number("<I")
    if version not in (2, VERSION):
        raise VectorFileError(
            f"{source} is of GGUF version {version}, and 2 and 3 are known "
            "(little-endian only); write it again with a current llama.cpp."
        )
    tensors, values = cursor.number(_LENGTH), cursor.number(_LENGTH)
    metadata: dict[str, Any] = {}
    kinds: dict[str, Kind] = {}
    for _ in range(values):
        key = cursor.text()
        if key in metadata:
            raise cursor.broken(f"the key {key[:60]!r} twice")
        kinds[key] = cursor.kind()
        metadata[key] = cursor.value(kinds[key])
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & alignment - 1:
        raise cursor.broken(f"an alignment of {alignment!r:.40}")
    rows = [cursor.row() for _ in range(tensors)]
    if len({name for name, _, _ in rows}) != len(rows):
        raise cursor.broken("two tensors of one name")
    start = -(-cursor.at // alignment) * alignment
    return Gguf(
        metadata,
        kinds,
        {name: cursor.tensor(name, shape, start + offset) for name, shape, offset in rows},
    )


def write_gguf(values: Sequence[tuple[str, Kind, Any]], tensors: Mapping[str, Tensor]) -> bytes:
    """Return the file, version 3: values and tensors in the order given, tensors as fp32 `[n]`."""
    head = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(values))]
    for key, kind, value in values:
        head += [_packed(key), struct.pack("<I", kind)]
        head += [_packed(value) if kind is Kind.STRING else struct.pack(_SCALARS[kind], value)]
    body: list[bytes] = []
    offset = 0
    for name, tensor in tensors.items():
        raw = tensor.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4").tobytes()
        head += [_packed(name), struct.pack("<IQIQ", 1, tensor.numel(), F32, offset)]
        body += [raw, bytes(-len(raw) % ALIGNMENT)]
        offset += len(raw) + len(body[-1])
    front = b"".join(head)
    return front + bytes(-len(front) % ALIGNMENT) + b"".join(body)


def _packed(text: str) -> bytes:
    raw = text.encode()
    return struct.pack(_LENGTH, len(raw)) + raw


class _Cursor:
    """A place in the bytes that never leaves them."""

    def __init__(self, data: bytes, source: str) -> None:
        self.data, self.source, self.at = data, source, 0

    def broken(self, what: str) -> VectorFileError:
        return VectorFileError(
            f"{self.source} is not a whole GGUF file: it has {what}; fetch or export it again."
        )

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise self.broken(f"{len(self.data)} bytes and names more")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        try:
            return self.take(self.number(_LENGTH)).decode()
        except UnicodeDecodeError as error:
            raise self.broken("text that is not UTF-8") from error

    def kind(self) -> Kind:
        number = self.number("<I")
        try:
            return Kind(number)
        except ValueError as error:
            raise self.broken(f"a value of type {number}, which GGUF does not have") from error

    def value(self, kind: Kind) -> Any:
        if kind is Kind.STRING:
            return self.text()
        if kind is not Kind.ARRAY:
            return self.number(_SCALARS[kind])
        inner, count = self.kind(), self.number(_LENGTH)
        if inner is Kind.ARRAY:
            raise self.broken("a list of lists, which control vectors do not have")
        if inner is Kind.STRING:
            return [self.text() for _ in range(count)]
        raw = self.take(count * struct.calcsize(_SCALARS[inner]))
        return [value for (value,) in struct.iter_unpack(_SCALARS[inner], raw)]

    def row(self) -> tuple[str, tuple[int, ...], int]:
        name, dimensions = self.text(), self.number("<I")
        if dimensions > 4:
            raise self.broken(f"a tensor of {dimensions} dimensions")
        shape = tuple(self.number(_LENGTH) for _ in range(dimensions))
        kind, offset = self.number("<I"), self.number(_LENGTH)
        if kind != F32:
            raise VectorFileError(
                f"{self.source} has {name[:60]!r} as GGUF type {kind}; directions are fp32 "
                "(type 0), so write it again unquantised."
            )
        return name, shape, offset

    def tensor(self, name: str, shape: tuple[int, ...], start: int) -> Tensor:
        count = 1
        for size in shape:
            count *= size
        if start + 4 * count > len(self.data):
            raise self.broken(f"{len(self.data)} bytes and {name[:60]!r} beyond them")
        found = np.frombuffer(self.data, "<f4", count, start).astype(np.float32)
        # GGUF writes the innermost dimension first.
        return torch.from_numpy(found).reshape(shape[::-1])
