"""The library: content-addressed objects, manifests, names with history, and the bases' digests."""

from vectors.store.catalog import Entry
from vectors.store.changes import LogRow
from vectors.store.check import Checked, Fault
from vectors.store.checkpoint import Checkpoint
from vectors.store.collect import Collection
from vectors.store.diff import Difference, TensorDifference
from vectors.store.digest import DIGEST_CACHE, base_digest
from vectors.store.exchange import Transfer
from vectors.store.library import Library
from vectors.store.manifests import Manifest, TensorPart
from vectors.store.marks import Pin

__all__ = [
    "DIGEST_CACHE",
    "Checked",
    "Checkpoint",
    "Collection",
    "Difference",
    "Entry",
    "Fault",
    "Library",
    "LogRow",
    "Manifest",
    "Pin",
    "TensorDifference",
    "TensorPart",
    "Transfer",
    "base_digest",
]
