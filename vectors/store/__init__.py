"""The library: content-addressed objects, manifests, names with history, and the bases' digests."""

from vectors.store.catalog import Entry
from vectors.store.changes import LogRow
from vectors.store.checkpoint import Checkpoint
from vectors.store.diff import Difference, TensorDifference
from vectors.store.digest import DIGEST_CACHE, base_digest
from vectors.store.library import Library
from vectors.store.manifests import Manifest, TensorPart
from vectors.store.marks import Pin

__all__ = [
    "DIGEST_CACHE",
    "Checkpoint",
    "Difference",
    "Entry",
    "Library",
    "LogRow",
    "Manifest",
    "Pin",
    "TensorDifference",
    "TensorPart",
    "base_digest",
]
