"""What a manifest says and its own objects deny: shapes, types, sizes, bases.

A manifest's hash proves that it is what somebody wrote, not that it is true. What can be told
without the base is told here; the rest (the content hash of every tensor) is checked on restoring.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import zstandard

from vectors.errors import StoreCorrupt
from vectors.store.checkpoint import DTYPES
from vectors.store.manifests import Manifest, TensorPart
from vectors.store.objects import Objects
from vectors.store.payloads import read_recipe, read_steering

__all__ = ["lies"]

AGAIN = "save its entry again"
HEADER = 18  # the longest header of a zstd frame


def lies(manifest: Manifest, digest: str, objects: Objects) -> Iterator[str]:
    """Yield a sentence for each untrue thing in a manifest whose objects are there."""
    for name, part in manifest.tensors.items():
        if part.hash in objects:
            yield from _tensor(part, f"'{name}' of {digest[:12]}", objects)
    if manifest.kind == "steering-vector" and all(h in objects for h in manifest.files.values()):
        try:
            read_steering(objects, manifest, digest[:12])
        except StoreCorrupt as error:
            yield str(error)
    if manifest.kind == "recipe":
        try:
            read_recipe(manifest, digest[:12])
        except StoreCorrupt as error:
            yield str(error)


def _tensor(part: TensorPart, what: str, objects: Objects) -> Iterator[str]:
    if part.dtype not in DTYPES:
        yield f"The tensor {what} has the type {part.dtype[:20]!r}, which none has; {AGAIN}."
        return
    elements = math.prod(part.shape)
    if part.changed > elements:
        yield (
            f"The tensor {what} has {elements} elements and says that {part.changed} changed; "
            f"{AGAIN}."
        )
    need = elements * DTYPES[part.dtype].itemsize
    try:
        with objects.path(part.hash).open("rb") as file:
            size = zstandard.get_frame_parameters(file.read(HEADER)).content_size
    except (OSError, zstandard.ZstdError) as error:
        yield f"The payload of the tensor {what} cannot be read ({error}); {AGAIN}."
        return
    if size != need:
        yield (
            f"The tensor {what} is said to be {part.dtype} {list(part.shape)}, which takes {need} "
            f"bytes, and its payload holds {size}; {AGAIN}."
        )
