"""The digest that says exactly which base a vector belongs to."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from vectors.errors import OutOfSpace
from vectors.formats.atomic import write_atomic
from vectors.formats.canonical import canonical_json, sha256
from vectors.store.checkpoint import WeightFile, weight_files

__all__ = ["DIGEST_CACHE", "base_digest"]

DIGEST_CACHE = ".workbench-digest.json"
CHUNK = 8 << 20

Row = tuple[str, str, tuple[int, ...], str]


class _File(BaseModel):
    """The rows of one weight file, good for as long as size and time of change stay."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    mtime_ns: int
    rows: list[Row]


class _Cache(BaseModel):
    files: dict[str, _File] = {}


def base_digest(folder: Path, cache: Path | None = None) -> str:
    """Return the Merkle root of the weights in a Hugging Face checkpoint folder.

    `sha256(canonical JSON of [[name, dtype, shape, sha256 of the raw bytes], ...])`, sorted by
    name; dtypes are spelt as safetensors spells them. Sharding does not change it. `cache` is a
    JSON file that keeps the hashes of files whose name, size and time of change are the same.

    Raises:
        ModelNotSupported: no weights in `folder`, or damaged ones.
    """
    known = _read(cache)
    fresh: dict[str, _File] = {}
    for file in weight_files(folder):
        state = file.path.stat()
        row = known.files.get(file.path.name)
        if row is None or (row.size, row.mtime_ns) != (state.st_size, state.st_mtime_ns):
            row = _File(size=state.st_size, mtime_ns=state.st_mtime_ns, rows=_rows(file))
        fresh[file.path.name] = row
    if cache is not None and fresh != known.files:
        # A model folder that cannot be written only costs hashing again the next time.
        with suppress(OutOfSpace):
            write_atomic(cache, canonical_json(_Cache(files=fresh).model_dump(mode="json")))
    return sha256(canonical_json(sorted(r for file in fresh.values() for r in file.rows)))


def _read(cache: Path | None) -> _Cache:
    if cache is None:
        return _Cache()
    try:
        return _Cache.model_validate_json(cache.read_bytes())
    except (OSError, ValidationError):
        return _Cache()


def _rows(file: WeightFile) -> list[Row]:
    rows: list[Row] = []
    with file.path.open("rb") as opened:
        for slot in file.slots:
            opened.seek(slot.start)
            hashed, left = hashlib.sha256(), slot.end - slot.start
            while left and (chunk := opened.read(min(CHUNK, left))):
                hashed.update(chunk)
                left -= len(chunk)
            rows.append((slot.name, slot.dtype, slot.shape, hashed.hexdigest()))
    return rows
