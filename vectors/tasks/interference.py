"""How task vectors get in each other's way, before anyone merges them.

Shape letters: K task vectors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt

import torch
from torch import Tensor

from vectors.errors import InputError, ShapeMismatch
from vectors.store.checkpoint import Checkpoint
from vectors.tasks.delta import delta
from vectors.tasks.sources import Term
from vectors.tasks.trim import cut, rank_of

__all__ = ["Interference", "Pair", "deltas_of", "interference", "layer_of"]

WHOLE = "all"
PART = 1 << 20  # elements at a time, so that fp64 stays small
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.([0-9]+)\.")


@dataclass(frozen=True)
class Pair:
    """How two task vectors meet in one place.

    Args:
        cosine: of the two deltas; 0 where one of them is 0.
        conflict: share of the elements that both move in which they move apart; 0 if there is none.
        overlap: elements that are among the largest of both, over those among the largest of
            either; 1 means that both work in the same place, and chance alone gives
            `density / (2 - density)`.
        shared: how many elements both move.
    """

    first: str
    second: str
    cosine: float
    conflict: float
    overlap: float
    shared: int


@dataclass(frozen=True)
class Interference:
    """What was found, pairs in the order of their keys.

    Args:
        density: the share of each tensor that counts as its largest elements.
        tensors: by tensor name.
        layers: by layer ("0", "1", ...), and "other" for tensors outside of any.
        whole: over the whole model.
        norms: Frobenius norm of each task vector.
    """

    density: float
    tensors: Mapping[str, tuple[Pair, ...]]
    layers: Mapping[str, tuple[Pair, ...]]
    whole: tuple[Pair, ...]
    norms: Mapping[str, float]


@dataclass
class _Sums:
    """What adds up over tensors, so that each layer needs no second look."""

    dot: float = 0.0
    first: float = 0.0
    second: float = 0.0
    apart: int = 0
    shared: int = 0
    both: int = 0
    either: int = 0

    def add(self, other: _Sums) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def pair(self, first: str, second: str) -> Pair:
        size = sqrt(self.first) * sqrt(self.second)
        return Pair(
            first,
            second,
            self.dot / size if size else 0.0,
            self.apart / self.shared if self.shared else 0.0,
            self.both / self.either if self.either else 0.0,
            self.shared,
        )


def interference(
    keys: Sequence[str],
    names: Iterable[str],
    deltas: Callable[[str], Mapping[str, Tensor]],
    density: float = 0.2,
    progress: Callable[[str], None] | None = None,
) -> Interference:
    """Compare task vectors pair by pair, one tensor in memory at a time.

    Args:
        keys: the task vectors.
        names: the tensors to look at.
        deltas: gives the deltas of a tensor by key, fp32 and of one shape; a task vector that
            leaves the tensor alone can be left out.
        density: which share of each tensor counts as its largest elements, as TIES would trim it.
        progress: told the name of each tensor that is done.

    Raises:
        InputError: fewer than two task vectors, a density out of bounds, or values not finite.
        ShapeMismatch: deltas of one tensor whose shapes differ.
    """
    if len(set(keys)) < 2:
        raise InputError("Interference is between task vectors; give at least two different ones.")
    if not 0 < density <= 1:
        raise InputError(f"The density must lie above 0 and not above 1, not {density}; try 0.2.")
    pairs = list(combinations(sorted(set(keys)), 2))
    layers: dict[str, dict[tuple[str, str], _Sums]] = {}
    tensors: dict[str, tuple[Pair, ...]] = {}
    squares = dict.fromkeys(sorted(set(keys)), 0.0)
    for name in names:
        found = deltas(name)
        _check(name, found)
        tops = {key: _top(x, density) for key, x in found.items()}
        for key, x in found.items():
            squares[key] += sum(float((part**2).sum()) for part in _parts(x))
        place = layers.setdefault(layer_of(name), {pair: _Sums() for pair in pairs})
        here: list[Pair] = []
        for pair in pairs:
            sums = _compare(*((found.get(key), tops.get(key)) for key in pair))
            place[pair].add(sums)
            here.append(sums.pair(*pair))
        tensors[name] = tuple(here)
        if progress is not None:
            progress(name)
    total = {pair: _Sums() for pair in pairs}
    for place in layers.values():
        for pair in pairs:
            total[pair].add(place[pair])
    order = sorted(
        layers, key=lambda layer: (not layer.isdigit(), int(layer) if layer.isdigit() else 0)
    )
    return Interference(
        density,
        tensors,
        {layer: tuple(layers[layer][p].pair(*p) for p in pairs) for layer in order},
        tuple(total[pair].pair(*pair) for pair in pairs),
        {key: sqrt(square) for key, square in squares.items()},
    )


def deltas_of(checkpoint: Checkpoint, terms: Sequence[Term]) -> Callable[[str], dict[str, Tensor]]:
    """Return what gives `interference` the deltas of folders or library entries on a base."""

    def look_up(name: str) -> dict[str, Tensor]:
        base = checkpoint[name]
        return {t.key: delta(base, t.tensor(name, base)) for t in terms if t.changes(name)}

    return look_up


def layer_of(name: str) -> str:
    """Return the layer that a tensor belongs to by its name, or "other"."""
    found = _LAYER.search(name)
    return found[1] if found else "other"


def _check(name: str, found: Mapping[str, Tensor]) -> None:
    shapes = {tuple(x.shape) for x in found.values()}
    if len(shapes) > 1:
        raise ShapeMismatch(
            f"'{name}' has the shapes {sorted(shapes)}; compare task vectors of one base."
        )
    for key, x in found.items():
        if not torch.isfinite(x).all():
            raise InputError(
                f"The task vector {key[:12]} moves '{name}' by values that are not finite; "
                "leave it out, or train it again."
            )


def _top(x: Tensor, density: float) -> float:
    """The smallest magnitude among the largest; elements that do not move are never among them."""
    return cut(x, rank_of(density, x.numel())) if x.numel() else 0.0


def _compare(
    first: tuple[Tensor | None, float | None], second: tuple[Tensor | None, float | None]
) -> _Sums:
    (x, low_x), (y, low_y) = first, second
    sums = _Sums()
    for own, value, low in (("first", x, low_x), ("second", y, low_y)):
        if value is None or low is None:
            continue
        for part in _parts(value):
            setattr(sums, own, getattr(sums, own) + float((part**2).sum()))
            sums.either += int(((part.abs() >= low) & (part != 0)).sum())
    if x is None or y is None or low_x is None or low_y is None:
        return sums
    for a, b in zip(_parts(x), _parts(y), strict=True):
        sums.dot += float((a * b).sum())
        sums.apart += int((a.sign() * b.sign() < 0).sum())
        sums.shared += int(((a != 0) & (b != 0)).sum())
        largest = (a.abs() >= low_x) & (b.abs() >= low_y)
        sums.both += int((largest & (a != 0) & (b != 0)).sum())
    sums.either -= sums.both
    return sums


def _parts(x: Tensor) -> Iterator[Tensor]:
    flat = x.reshape(-1)
    for start in range(0, x.numel(), PART):
        yield flat[start : start + PART].double()
