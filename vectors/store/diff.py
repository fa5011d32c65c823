"""What differs between two entries, from hashes and stored norms; no payload is read.

With one base, the difference of two task vectors a and b in a tensor lies between
`| |a| - |b| |` and `|a| + |b|` (the triangle inequality), and where one of them leaves the tensor
alone it is exactly the other's norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vectors.store.entries import Entry
from vectors.store.manifests import TensorPart

__all__ = ["Difference", "TensorDifference", "compare"]


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that two entries have differently.

    Args:
        state: "added" (only the new entry changes it), "removed" (only the old one), "changed".
        old_norm, new_norm: Frobenius norms of the deltas; 0 where the base is left as it is, None
            where one is not finite.
        least, most: bounds of the norm of their difference; None where they have no common base.
        old_changed, new_changed: how many elements differ from the base.
    """

    name: str
    state: str
    shape: tuple[int, ...]
    dtype: str
    old_norm: float | None
    new_norm: float | None
    least: float | None
    most: float | None
    old_changed: int
    new_changed: int


@dataclass(frozen=True)
class Difference:
    """What differs between two entries; `same` counts the tensors that do not."""

    old: str
    new: str
    equal: bool
    same_base: bool
    same: int
    tensors: tuple[TensorDifference, ...]
    files: Mapping[str, str]
    info: Mapping[str, tuple[Any, Any]]


def compare(old: Entry, new: Entry) -> Difference:
    """Return what differs between the two; equal content is told by its hashes."""
    a, b = old.manifest, new.manifest
    same_base = a.base == b.base
    names = sorted(a.tensors.keys() | b.tensors.keys())
    rows = [_tensor(n, a.tensors.get(n), b.tensors.get(n), same_base) for n in names]
    return Difference(
        old=old.digest,
        new=new.digest,
        equal=old.digest == new.digest,
        same_base=same_base,
        same=sum(row is None for row in rows),
        tensors=tuple(row for row in rows if row is not None),
        files={
            name: _state(a.files.get(name), b.files.get(name))
            for name in sorted(a.files.keys() | b.files.keys())
            if a.files.get(name) != b.files.get(name)
        },
        info={
            key: (a.info.get(key), b.info.get(key))
            for key in sorted(a.info.keys() | b.info.keys())
            if a.info.get(key) != b.info.get(key)
        },
    )


def _tensor(
    name: str, old: TensorPart | None, new: TensorPart | None, same_base: bool
) -> TensorDifference | None:
    if old is not None and new is not None and same_base and old.content == new.content:
        return None
    part = new or old
    assert part is not None  # the names come from the two
    old_norm = old.norm if old else 0.0
    new_norm = new.norm if new else 0.0
    bounded = same_base and old_norm is not None and new_norm is not None
    return TensorDifference(
        name=name,
        state=_state(old, new),
        shape=part.shape,
        dtype=part.dtype,
        old_norm=old_norm,
        new_norm=new_norm,
        least=abs(new_norm - old_norm) if bounded else None,  # type: ignore[operator]
        most=new_norm + old_norm if bounded else None,  # type: ignore[operator]
        old_changed=old.changed if old else 0,
        new_changed=new.changed if new else 0,
    )


def _state(old: object, new: object) -> str:
    if old is None:
        return "added"
    return "removed" if new is None else "changed"
