"""Where counted magnitudes are kept, so that the next merge of the same task vectors needs no count.

They can always be counted again, so nothing is lost with them; one that is damaged is counted anew.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vectors.errors import OutOfSpace, StoreCorrupt
from vectors.formats.atomic import write_atomic
from vectors.tasks.histograms import Histogram, read_histograms, write_histograms

if TYPE_CHECKING:
    from vectors.store.library import Library

__all__ = ["FolderMemo", "LibraryMemo", "Memo"]

KIND = "magnitudes"
FILE = "magnitudes.safetensors"

Histograms = dict[str, Histogram]


class Memo(Protocol):
    """Keeps the histograms of task vectors by their keys; `scope` is that of TIES."""

    def load(self, key: str, scope: str) -> Histograms | None:
        """Return what was kept, or None."""
        ...

    def save(self, key: str, scope: str, histograms: Histograms) -> None:
        """Keep the histograms: by tensor, or of all tensors under the name ""."""
        ...


class LibraryMemo:
    """Attestations beside the task vectors of a library; they change no identity."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def load(self, key: str, scope: str) -> Histograms | None:
        """Return what was attested last, or None where there is nothing, or nothing whole."""
        with suppress(StoreCorrupt):
            for found in reversed(self._library.attestations(key, KIND)):
                if found.get("scope") == scope and FILE in found["attested"]["files"]:
                    data = self._library.objects.read(found["attested"]["files"][FILE])
                    return read_histograms(data)
        return None

    def save(self, key: str, scope: str, histograms: Histograms) -> None:
        """Attest the histograms."""
        files = {FILE: write_histograms(histograms)}
        self._library.attest(key, KIND, {"scope": scope}, files=files)


class FolderMemo:
    """Files in a folder, for fine-tunes that are not in a library; all of one base."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, key: str, scope: str) -> Histograms | None:
        """Return what was kept, or None where there is nothing, or nothing whole."""
        with suppress(OSError, StoreCorrupt):
            return read_histograms(self._path(key, scope).read_bytes())
        return None

    def save(self, key: str, scope: str, histograms: Histograms) -> None:
        """Keep the histograms; a folder that cannot be written only costs counting again."""
        with suppress(OutOfSpace):
            write_atomic(self._path(key, scope), write_histograms(histograms))

    def _path(self, key: str, scope: str) -> Path:
        return self._folder / f"{key}.{scope}.safetensors"
