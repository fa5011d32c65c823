"""Resolve each steering text once, for as long as the library stays as it is.

A look-up reads and checks a vector's whole file, some milliseconds. What a text means depends on the
library's names alone, because what they mean is immutable; so it is remembered until a name changes,
or until a file that it was read from is no longer what it was.
"""

from __future__ import annotations

from threading import Lock
from typing import Any

from vectors.store import Library
from workbench.engines.vllm.spec import Known, Resolved, known, parse_steering, resolve

__all__ = ["Resolver"]

KEPT = 512
LONGEST = 8192


class Resolver:
    """Resolves what clients send as `steer`, for one base."""

    def __init__(self, library: Library, base: str) -> None:
        self._library = library
        self._base = base
        self._watch = library.watch()
        self._lock = Lock()
        self._mark = (-1, -1)
        self._texts: dict[str, tuple[Resolved, tuple[Known, ...]]] = {}
        self._known: dict[str, Known] = {}

    def __call__(self, text: str) -> Resolved:
        """Return what `resolve_request` would.

        Raises:
            InputError: see there.
        """
        mark = self._watch.mark()
        with self._lock:
            if mark != self._mark:
                self._texts.clear()
                self._known.clear()
                self._mark = mark
            found = self._texts.get(text) if isinstance(text, str) else None
        if found is not None and all(vector.untouched() for vector in found[1]):
            return found[0]
        used: list[Known] = []

        def find(ref: str) -> Known:
            used.append(self._find(ref, mark))
            return used[-1]

        resolved = resolve(parse_steering(text), find, self._base)
        if len(text) <= LONGEST:
            self._keep(self._texts, text, (resolved, tuple(used)), mark)
        return resolved

    def _find(self, ref: str, mark: tuple[int, int]) -> Known:
        found = self._known.get(ref)
        if found is None or not found.untouched():
            found = known(self._library, ref)
            self._keep(self._known, ref, found, mark)
        return found

    def _keep(self, kept: dict[str, Any], key: str, value: Any, mark: tuple[int, int]) -> None:
        """Remember what was read after `mark`, unless something has changed by now."""
        with self._lock:
            if mark != self._mark:
                return
            kept[key] = value
            if len(kept) > KEPT:
                del kept[next(iter(kept))]
