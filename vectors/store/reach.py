"""What must stay: everything that can be reached from a name, the log, a pin or a lease."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from vectors.store.attestations import Attestations
from vectors.store.leases import alive
from vectors.store.manifests import Manifest, Manifests

__all__ = ["Reach", "Roots", "closure", "roots"]


@dataclass
class Reach:
    """Manifests and objects that must stay, by digest."""

    manifests: set[str] = field(default_factory=set)
    objects: set[str] = field(default_factory=set)


class Roots(NamedTuple):
    """The digests that something means; those that are `logged` alone may have been collected before."""

    needed: set[str]
    logged: set[str]


def roots(db: sqlite3.Connection, since: str) -> Roots:
    """What something means: living names, names deleted and changes logged from `since` on, tags
    (which belong to names), pins, and leases of processes that live.
    """
    rows = db.execute(
        """SELECT refs.digest FROM refs JOIN names ON names.id = refs.name_id
               WHERE names.deleted IS NULL OR (names.deleted >= ?1 AND names.collected IS NULL)
           UNION SELECT digest FROM pins""",
        (since,),
    ).fetchall()
    logged = db.execute("SELECT digest FROM reflog WHERE created >= ?", (since,)).fetchall()
    leases = db.execute(
        "SELECT digest, pid FROM leases WHERE expires >= ?", (time.time(),)
    ).fetchall()
    leased = {row["digest"] for row in leases if alive(row["pid"])}
    return Roots({row["digest"] for row in rows} | leased, {row["digest"] for row in logged})


def closure(
    found: Iterable[str],
    manifests: Manifests,
    attestations: Attestations | None,
    known: dict[str, Manifest],
    if_there: Iterable[str] = (),
) -> Reach:
    """Return all that `found` leads to: parents that are here, objects, attestations.

    `known` keeps the manifests that were read, so that a second call reads only what is new. What stands
    in `if_there` leads on where it has not been removed.

    Raises:
        StoreCorrupt: a manifest on the way is missing or damaged.
    """
    reach, waiting = Reach(), [(digest, False) for digest in if_there]
    waiting += [(digest, True) for digest in found]
    while waiting:
        digest, needed = waiting.pop()
        if digest in reach.manifests or not (needed or digest in known or digest in manifests):
            continue
        if digest not in known:
            known[digest] = manifests.get(digest)
        manifest = known[digest]
        reach.manifests.add(digest)
        reach.objects.update(manifest.objects())
        waiting.extend((parent, manifest.kind == "recipe") for parent in manifest.parents)
    if attestations is not None:
        reach.objects.update(attestations.objects(reach.manifests))
    return reach
