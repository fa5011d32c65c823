"""Resolve each steering text once, for as long as the library stays as it is.

A look-up reads and checks a vector's whole file, some milliseconds. What a text means depends on the
library's names alone, because what they mean is immutable; so it is remembered until a name changes,
or until a file that it was read from is no longer what it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from threading import Lock
from typing import Any, NamedTuple

from vectors.errors import BlockNotFound, ShapeMismatch
from vectors.store import Library
from workbench.engines.vllm.spec import Known, Resolved, known, parse_steering, resolve

__all__ = ["Resolver", "Shape", "check_shape", "shape_of"]

KEPT = 512
LONGEST = 8192


class Shape(NamedTuple):
    """A model's width and number of blocks; what is None, a worker finds out."""

    width: int | None = None
    blocks: int | None = None


UNKNOWN = Shape()


def shape_of(config: Any) -> Shape:
    """The shape of the model that vLLM's settings name."""
    blocks = getattr(config.model_config.hf_text_config, "num_hidden_layers", None)
    return Shape(config.model_config.get_hidden_size(), blocks)


def check_shape(ref: str, vector: Known, blocks: Iterable[int], shape: Shape) -> None:
    """Refuse a vector that a model cannot be steered by.

    Raises:
        ShapeMismatch: it is of another width.
        BlockNotFound: one of `blocks` is behind the model's last.
    """
    if shape.width is not None and vector.width != shape.width:
        raise ShapeMismatch(
            f"The vector '{ref}' has width {vector.width} and this model {shape.width}; extract it "
            "again for this model."
        )
    behind = [block for block in blocks if shape.blocks is not None and block >= shape.blocks]
    if behind:
        raise BlockNotFound(
            f"The vector '{ref}' cannot be used at block {min(behind)}; this model has "
            f"{shape.blocks} blocks."
        )


class Resolver:
    """Resolves what clients send as `steer`, for one base."""

    def __init__(self, library: Library, base: str) -> None:
        self._library = library
        self._base = base
        self._watch = library.watch()
        self._lock = Lock()
        self._mark = (-1, -1)
        self._texts: dict[tuple[str, Shape], tuple[Resolved, dict[str, Known]]] = {}
        self._known: dict[str, Known] = {}

    def __call__(self, text: str, shape: Shape = UNKNOWN) -> Resolved:
        """Return what `resolve_request` would, for a model of this shape.

        Raises:
            InputError: see there, and `check_shape`.
        """
        mark = self._marked()
        with self._lock:
            found = self._texts.get((text, shape)) if isinstance(text, str) else None
        if found is not None and all(vector.untouched() for vector in found[1].values()):
            return found[0]
        used: dict[str, Known] = {}

        def find(ref: str) -> Known:
            used[ref] = self._find(ref, mark)
            return used[ref]

        resolved = resolve(parse_steering(text), find, self._base)
        for ref, vector in used.items():
            check_shape(ref, vector, _blocks(resolved, vector.digest), shape)
        if len(text) <= LONGEST:
            self._keep(self._texts, (text, shape), (resolved, used), mark)
        return resolved

    def vector(self, ref: str) -> Known:
        """Look one vector up.

        Raises:
            NameNotFound, StoreCorrupt: no such vector, or a damaged one.
        """
        return self._find(ref, self._marked())

    def _marked(self) -> tuple[int, int]:
        """The library's mark, when all that was read before another one is forgotten."""
        mark = self._watch.mark()
        with self._lock:
            if mark != self._mark:
                self._texts.clear()
                self._known.clear()
                self._mark = mark
        return mark

    def _find(self, ref: str, mark: tuple[int, int]) -> Known:
        found = self._known.get(ref)
        if found is None or not found.untouched():
            found = known(self._library, ref)
            self._keep(self._known, ref, found, mark)
        return found

    def _keep(self, kept: dict[Any, Any], key: Any, value: Any, mark: tuple[int, int]) -> None:
        """Remember what was read after `mark`, unless something has changed by now."""
        with self._lock:
            if mark != self._mark:
                return
            kept[key] = value
            if len(kept) > KEPT:
                del kept[next(iter(kept))]


def _blocks(resolved: Resolved, digest: str) -> Iterable[int]:
    """At which blocks a vector is used, as steering or as a condition."""
    at = [i.block for i in resolved.injections if i.vector == digest]
    condition = resolved.condition
    if condition is not None and condition.vector == digest:
        at.append(condition.block)
    return at
