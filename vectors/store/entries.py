"""What an entry is to those who use the library, and the index that lists many at once."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from vectors.store.manifests import Manifest
from vectors.store.refs import Ref

__all__ = ["Entry", "index"]


@dataclass(frozen=True)
class Entry:
    """One revision of one name, or a manifest without a name.

    Without a name, `name` is the first 12 digits of the digest, `revision` 0 and `created` empty.
    `manifest` and `info` are read when first asked for, so that a list of many is cheap.
    """

    name: str
    kind: str
    revision: int
    digest: str
    base: str | None
    created: str
    read: Callable[[Ref], Manifest] = field(repr=False, compare=False)
    bytes: int | None = field(default=None, repr=False, compare=False)

    @cached_property
    def manifest(self) -> Manifest:
        """What the entry is made of.

        Raises:
            StoreCorrupt: the manifest is missing or damaged.
        """
        return self.read(self.ref)

    @property
    def info(self) -> Mapping[str, Any]:
        """What its maker wrote down about it."""
        return self.manifest.info

    @property
    def ref(self) -> Ref:
        """The revision."""
        return Ref(self.name, self.kind, self.revision, self.digest, self.created)


def index(db: sqlite3.Connection, digest: str, manifest: Manifest, size: int) -> None:
    """Note what lists show of a manifest; the manifest stays the truth, and this can be remade."""
    db.execute(
        "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)",
        (digest, manifest.kind, manifest.base or "", size),
    )
