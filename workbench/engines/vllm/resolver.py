"""Resolve each steering text once, for as long as the library stays as it is.

A look-up reads and checks a vector's whole file, some milliseconds. What a text means depends on the
library's names alone, because what they mean is immutable; so it is remembered until a name changes.
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
        self._texts: dict[str, Resolved] = {}
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
        if found is None:
            found = resolve(parse_steering(text), lambda ref: self._find(ref, mark), self._base)
            if len(text) <= LONGEST:
                self._keep(self._texts, text, found, mark)
        return found

    def _find(self, ref: str, mark: tuple[int, int]) -> Known:
        found = self._known.get(ref)
        if found is None:
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
