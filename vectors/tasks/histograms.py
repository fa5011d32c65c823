"""Exact ranks without a sort: how often each magnitude occurs.

The bits of a positive fp32, read as an integer, are in the order of its value, so the upper 19 bits
of a magnitude number its bin. Differences of bf16 weights rarely have bits below those; the few
that do are kept one by one ("loose"), so that the histogram answers every rank exactly, at once and
for ever. Of fp32 weights nearly all do; then the histogram says which bin has the rank, and one
more look at that bin gives the magnitude.

Shape letters: B bins that are not empty, L loose magnitudes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from vectors.errors import StoreCorrupt

__all__ = ["BINS", "LOW", "Histogram", "read_histograms", "write_histograms"]

LOW = 12
BINS = 1 << (31 - LOW)


@dataclass(frozen=True)
class Histogram:
    """How often each magnitude occurs in a task vector, or in one tensor of it.

    Args:
        bins_B: the numbers of the bins that are not empty, ascending.
        counts_B: how many magnitudes each has, the loose ones included.
        loose_L: bits of the magnitudes that are not the lower edge of a bin, ascending; None where
            there were too many to keep.
    """

    bins_B: NDArray[np.uint32]
    counts_B: NDArray[np.int64]
    loose_L: NDArray[np.uint32] | None

    @classmethod
    def of(cls, counts: NDArray[np.int64], loose: Sequence[NDArray[np.uint32]] | None) -> Histogram:
        """Return the histogram of counts of all `BINS`."""
        bins_B = np.flatnonzero(counts)
        sorted_L = None
        if loose is not None:
            sorted_L = np.sort(np.concatenate([np.empty(0, np.uint32), *loose]))
        return cls(bins_B.astype(np.uint32), counts[bins_B], sorted_L)

    @property
    def size(self) -> int:
        """How many magnitudes were counted."""
        return int(self.counts_B.sum())

    def find(self, rank: int) -> tuple[int, int]:
        """Return the bin of the magnitude of `rank`, from the largest as 1, and its rank in it."""
        above_B = np.cumsum(self.counts_B[::-1])
        place = int(np.searchsorted(above_B, rank))
        before = int(above_B[place - 1]) if place else 0
        return int(self.bins_B[len(self.bins_B) - 1 - place]), rank - before

    def pick(self, number: int, rank: int) -> int | None:
        """Return the bits of the magnitude of `rank` in a bin; None if a look at it is needed."""
        if self.loose_L is None:
            return None
        edge = number << LOW
        first, last = np.searchsorted(self.loose_L, [edge, edge + (1 << LOW)])
        # Loose magnitudes are larger than the edge, which all others of the bin are.
        return int(self.loose_L[last - rank]) if rank <= last - first else edge


def write_histograms(histograms: Mapping[str, Histogram]) -> bytes:
    """Return named histograms as a safetensors file."""
    parts: dict[str, np.ndarray] = {}
    for name, histogram in histograms.items():
        parts[f"bins {name}"] = histogram.bins_B
        parts[f"counts {name}"] = histogram.counts_B
        if histogram.loose_L is not None:
            parts[f"loose {name}"] = histogram.loose_L
    return save(parts)


def read_histograms(data: bytes) -> dict[str, Histogram]:
    """Return the histograms of a file that `write_histograms` made.

    Raises:
        StoreCorrupt: not such a file.
    """
    try:
        parts = load(data)
        names = [name.removeprefix("bins ") for name in parts if name.startswith("bins ")]
        found = {
            name: Histogram(
                parts[f"bins {name}"], parts[f"counts {name}"], parts.get(f"loose {name}")
            )
            for name in names
        }
        whole = all(_is_whole(histogram) for histogram in found.values())
    except (SafetensorError, KeyError, ValueError) as error:
        raise StoreCorrupt(
            f"Kept magnitudes cannot be read ({error}); count them again."
        ) from error
    if not whole:
        raise StoreCorrupt("Kept magnitudes contradict each other; count them again.")
    return found


def _is_whole(histogram: Histogram) -> bool:
    bins_B, counts_B, loose_L = histogram.bins_B, histogram.counts_B, histogram.loose_L
    return (
        (bins_B.dtype, counts_B.dtype) == (np.uint32, np.int64)
        and bins_B.shape == counts_B.shape
        and bins_B.ndim == 1
        and bool(
            (bins_B[1:] > bins_B[:-1]).all() and (bins_B < BINS).all() and (counts_B > 0).all()
        )
        and (
            loose_L is None
            or (loose_L.dtype == np.uint32 and bool((loose_L[1:] >= loose_L[:-1]).all()))
        )
    )
