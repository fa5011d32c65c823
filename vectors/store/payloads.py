"""Between tensors and objects: what a steering vector and a task vector are kept as."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from vectors.errors import ShapeMismatch, StoreCorrupt, VectorFileError
from vectors.formats.canonical import sha256
from vectors.formats.native import vector_from_bytes
from vectors.store.checkpoint import dtype_name
from vectors.store.manifests import Manifest, TensorPart
from vectors.store.objects import Objects
from vectors.tasks.delta import decode_xor, encode_xor, measure, raw_bytes
from vectors.types import SteeringVector

__all__ = ["VECTOR_FILE", "BaseTensors", "Progress", "read_steering", "read_tuned", "write_task"]

VECTOR_FILE = "vector.safetensors"

BaseTensors = Mapping[str, Tensor] | Callable[[str], Tensor]
Progress = Callable[[float, str], None]


def read_steering(objects: Objects, manifest: Manifest, what: str) -> SteeringVector:
    """Return the steering vector of a manifest.

    Raises:
        StoreCorrupt: its file is missing or damaged, or is of another base than the manifest.
    """
    try:
        vector = vector_from_bytes(objects.read(manifest.files[VECTOR_FILE]), what)
    except (KeyError, VectorFileError) as error:
        raise StoreCorrupt(
            f"The steering vector {what} has no valid {VECTOR_FILE} ({error}); extract it again."
        ) from error
    if vector.base != manifest.base:
        raise StoreCorrupt(
            f"The steering vector {what} names base {vector.base[:12]} in its file and "
            f"{(manifest.base or 'none')[:12]} in its manifest; extract it again."
        )
    return vector


def write_task(
    objects: Objects,
    base_tensors: BaseTensors,
    tuned_tensors: Mapping[str, Tensor],
    progress: Progress | None = None,
) -> dict[str, TensorPart]:
    """Keep `tuned - base`, exactly, a tensor at a time; equal tensors are left out.

    Raises:
        ShapeMismatch: a tuned tensor that the base lacks or has in another shape or dtype.
        OutOfSpace: no space, or a folder that cannot be written.
    """
    look_up = base_tensors if callable(base_tensors) else base_tensors.__getitem__
    parts: dict[str, TensorPart] = {}
    for number, name in enumerate(sorted(tuned_tensors)):
        if progress is not None:
            progress(number / len(tuned_tensors), f"storing {name}")
        try:
            base = look_up(name)
        except KeyError:
            raise ShapeMismatch(
                f"The tuned model has a tensor '{name}' that the base lacks; pass only tensors of "
                "the base, and leave out tied copies."
            ) from None
        try:
            part = _part(objects, base, tuned_tensors[name])
        except ShapeMismatch as error:
            raise ShapeMismatch(f"'{name}': {error}") from error
        if part is not None:
            parts[name] = part
    return parts


def _part(objects: Objects, base: Tensor, tuned: Tensor) -> TensorPart | None:
    change = measure(base, tuned)
    if not change.changed:
        return None
    return TensorPart(
        hash=objects.write(encode_xor(base, tuned)),
        shape=tuple(tuned.shape),
        dtype=dtype_name(tuned.dtype),
        encoding="xor",
        content=sha256(raw_bytes(tuned)),
        norm=change.norm,
        changed=change.changed,
    )


def read_tuned(objects: Objects, part: TensorPart, name: str, base: Tensor) -> Tensor:
    """Return the tuned tensor, bit for bit.

    Raises:
        ShapeMismatch: a base tensor of another shape or dtype.
        StoreCorrupt: a damaged payload, or a base tensor with other bits than it was made for.
    """
    if (part.shape, part.dtype) != (tuple(base.shape), dtype_name(base.dtype)):
        raise ShapeMismatch(
            f"The task vector has '{name}' as {part.dtype} {list(part.shape)} and the base as "
            f"{dtype_name(base.dtype)} {list(base.shape)}; use the model that it was made for."
        )
    try:
        tuned = decode_xor(base, objects.read(part.hash))
    except StoreCorrupt as error:
        raise StoreCorrupt(f"'{name}': {error}") from error
    if sha256(raw_bytes(tuned)) != part.content:
        raise StoreCorrupt(
            f"'{name}' does not come back as it was saved, so the base's weights are not those "
            "that the task vector was made for; fetch the model again."
        )
    return tuned
