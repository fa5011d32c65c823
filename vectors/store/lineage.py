"""Where an entry comes from and what was made of it: revisions, and the links between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from vectors.errors import StoreCorrupt
from vectors.store.manifests import Manifest, Manifests
from vectors.store.refs import Ref

__all__ = ["Lineage", "Link", "Place", "lineage"]

MADE, NEXT = "made of", "next revision"


@dataclass(frozen=True)
class Place:
    """One revision of a name, or an entry that no name means any more.

    Args:
        key: `name@revision`, or the first 12 digits of the digest.
        kind: of the entry; empty where it is not in this library.
        created: when the name came to mean it; empty without a name.
    """

    key: str
    name: str
    revision: int
    digest: str
    kind: str
    created: str


@dataclass(frozen=True)
class Link:
    """From one place to a later one: "made of" (with the weight, in a recipe), "next revision"."""

    source: str
    target: str
    how: str
    weight: float | None = None


@dataclass(frozen=True)
class Lineage:
    """What an entry is related to, the oldest first; `left_out` counts what was too much."""

    entry: str
    places: tuple[Place, ...]
    links: tuple[Link, ...]
    left_out: int


def lineage(manifests: Manifests, refs: Sequence[Ref], asked: Ref, most: int) -> Lineage:
    """Return the revisions of a name with all that they come from and all that comes of them.

    Args:
        manifests: where the entries' manifests are.
        refs: every revision of every living name.
        asked: the entry; all revisions of its name are looked at.
        most: how many entries at the most; the nearest stay, those above before those below.
    """
    first: dict[str, Ref] = {}  # the revision in which each content first came
    for ref in sorted(refs, key=lambda r: (r.created, r.name, r.revision)):
        first.setdefault(ref.digest, ref)
    origins = {digest: _origins(manifests, digest) for digest in first}
    heirs: dict[str, list[str]] = {}
    for digest, found in origins.items():
        for parent in found:
            heirs.setdefault(parent, []).append(digest)

    def above(digest: str) -> Iterable[str]:
        return origins.setdefault(digest, _origins(manifests, digest))

    own = [r for r in refs if r.name == asked.name] or [asked]
    own.sort(key=lambda r: abs(r.revision - asked.revision))
    starts = [ref.digest for ref in own]
    reached = list(
        dict.fromkeys([*starts, *_walk(starts, above), *_walk(starts, lambda d: heirs.get(d, ()))])
    )
    kept = dict.fromkeys(reached[:most])
    shown = [
        first.get(digest) or Ref(digest[:12], _kind(manifests, digest), 0, digest, "")
        for digest in kept
    ]
    home = {ref.digest: _key(ref) for ref in shown}
    # A name's revisions of one content, as a revert makes them, are places of their own.
    places = {_key(ref): _place(ref) for ref in [*shown, *(r for r in own if r.digest in kept)]}
    made = [
        Link(home[parent], home[digest], MADE, weight)
        for digest in kept
        for parent, weight in origins.get(digest, {}).items()
        if parent in home
    ]
    order = sorted(places.values(), key=lambda p: (p.created, p.name, p.revision))
    links = (*made, *_revisions(order))
    return Lineage(_key(asked), tuple(order), links, len(reached) - len(kept))


def _revisions(places: Sequence[Place]) -> Iterator[Link]:
    """From each revision of a name to the next that is shown."""
    last: dict[str, Place] = {}
    for place in sorted((p for p in places if p.revision), key=lambda p: p.revision):
        if place.name in last:
            yield Link(last[place.name].key, place.key, NEXT)
        last[place.name] = place


def _walk(starts: Sequence[str], way: Callable[[str], Iterable[str]]) -> list[str]:
    """What can be reached by going on one way, the nearest first."""
    found, row = dict.fromkeys(starts), list(starts)
    while row:
        row = [d for d in dict.fromkeys(d for at in row for d in way(at)) if d not in found]
        found.update(dict.fromkeys(row))
    return list(found)


@lru_cache(maxsize=1 << 16)
def _read(folder: Path, digest: str) -> tuple[str, tuple[tuple[str, float | None], ...]]:
    """Kind and origins of an entry; a manifest never changes, so that one look is enough."""
    manifest: Manifest = Manifests(folder).get(digest)
    weights: dict[str, float] = {}
    if manifest.kind == "recipe":
        with suppress(TypeError, ValueError, KeyError):
            weights = {str(d): float(w) for d, w in manifest.info["terms"]}  # type: ignore
    return manifest.kind, tuple((d, weights.get(d)) for d in dict.fromkeys(manifest.parents))


def _origins(manifests: Manifests, digest: str) -> Mapping[str, float | None]:
    try:
        return dict(_read(manifests.root, digest)[1])
    except StoreCorrupt:
        return {}  # missing or damaged: what it came of is not known, and `fsck` says so


def _kind(manifests: Manifests, digest: str) -> str:
    try:
        return _read(manifests.root, digest)[0]
    except StoreCorrupt:
        return ""


def _key(ref: Ref) -> str:
    return f"{ref.name}@{ref.revision}" if ref.revision else ref.digest[:12]


def _place(ref: Ref) -> Place:
    return Place(_key(ref), ref.name, ref.revision, ref.digest, ref.kind, ref.created)
