"""What entries of the library have to do with each other, as plain JSON: lineage, differences, parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from math import sqrt
from typing import Any

from vectors.errors import NameNotFound
from vectors.grammar import TaskTerm, format_tasks
from vectors.store import Difference, Library
from vectors.tasks import Recipe
from vectors.tasks.interference import layer_of
from workbench.runs.record import RunView

__all__ = ["difference_of", "lineage_of", "parts_of"]

MADE_BY, MEASURED_BY = "made by", "measured by"


def lineage_of(library: Library, runs: Sequence[RunView], ref: str) -> dict[str, Any]:
    """An entry's relations, and the runs that made or measured them.

    Returns:
        `entry`, `places` and `links` as `vectors.store.lineage` has them, `left_out`, and `runs`: id,
        kind, asked_at, and links "made by" (to the entry) and "measured by" (from it).
    """
    found = asdict(library.lineage(ref))
    named = {(p["name"], p["revision"], p["digest"]): p["key"] for p in found["places"]}
    by_digest = {p["digest"]: p["key"] for p in reversed(found["places"])}
    links, rows = list(found["links"]), []
    for view in runs:
        result = view.result()
        digest = result.get("digest")
        made = named.get((result.get("name"), result.get("revision"), digest))
        if made is None and digest not in by_digest:
            continue
        if made is not None:
            links.append({"source": view.id, "target": made, "how": MADE_BY, "weight": None})
        else:
            key = by_digest[digest]
            links.append({"source": key, "target": view.id, "how": MEASURED_BY, "weight": None})
        rows.append({"id": view.id, "kind": view.kind, "asked_at": view.record.asked_at})
    return {**found, "links": links, "runs": rows}


def difference_of(library: Library, old: str, new: str) -> dict[str, Any]:
    """What differs between two entries: by file, information, tensor and layer, from hashes and norms;
    for two recipes by term, and for two steering vectors by block, from the directions themselves.

    Raises:
        GrammarError, NameNotFound, StoreCorrupt: see `Library.get`.
    """
    found = library.diff(old, new)
    before, after = library.get(old), library.get(new)
    told: dict[str, Any] = {
        **asdict(found),
        "names": [_name(before), _name(after)],
        "kinds": [before.kind, after.kind],
        "layers": _layers(found),
        "blocks": [],
        "terms": [],
    }
    if before.kind == after.kind == "recipe":
        weights = [dict(library.load_recipe(ref)[1].terms) for ref in (old, new)]
        told["terms"] = [
            {"name": _called(library, digest), "old": was, "new": is_}
            for digest in sorted(weights[0].keys() | weights[1].keys())
            if (was := weights[0].get(digest, 0.0)) != (is_ := weights[1].get(digest, 0.0))
        ]
    if before.kind == after.kind == "steering-vector" and not found.equal and found.same_base:
        vectors = [library.load_vector(ref)[1] for ref in (old, new)]
        a, b = (vector.directions for vector in vectors)
        told["blocks"] = [
            {
                "block": block,
                "cosine": float(a[block].double() @ b[block].double())
                if block in a and block in b
                else None,
                "old_norm": vectors[0].mean_norms.get(block),
                "new_norm": vectors[1].mean_norms.get(block),
            }
            for block in sorted(a.keys() | b.keys())
        ]
    return told


def parts_of(library: Library, ref: str) -> dict[str, Any]:
    """What a recipe is made of: `terms` (name and weight, and the text of both), `method`, `options`.

    Terms go by their names where those still mean them, else by name@revision, else by digest.

    Raises:
        GrammarError, NameNotFound, StoreCorrupt: see `Library.get`; a recipe is needed.
    """
    entry, recipe = library.load_recipe(ref)
    return {"name": entry.name, "base": entry.base, **_parts(library, recipe)}


def _parts(library: Library, recipe: Recipe) -> dict[str, Any]:
    terms = [(_called(library, digest), weight) for digest, weight in recipe.terms]
    text = format_tasks(
        [TaskTerm(n.partition("@")[0], w, n.partition("@")[2] or None) for n, w in terms]
    )
    return {
        "terms": [{"name": name, "weight": weight} for name, weight in terms],
        "text": text,
        "method": recipe.op.method,
        "options": dict(recipe.op.parameters.model_dump(mode="json")),
    }


def _called(library: Library, digest: str) -> str:
    entry = library.get(digest)
    if not entry.revision:
        return entry.name
    with suppress(NameNotFound):
        if library.get(entry.name).digest == digest:
            return entry.name
    return f"{entry.name}@{entry.revision}"


def _name(entry: Any) -> str:
    return f"{entry.name}@{entry.revision}" if entry.revision else entry.name


def _layers(found: Difference) -> list[dict[str, Any]]:
    """Norms and bounds by layer; squares of tensors add up. None where one of them is not known."""
    places: dict[str, list[Mapping[str, Any]]] = {}
    for row in found.tensors:
        places.setdefault(layer_of(row.name), []).append(asdict(row))
    order = sorted(
        places, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0)
    )
    keys = ("old_norm", "new_norm", "least", "most")
    return [
        {
            "layer": layer,
            "tensors": len(places[layer]),
            **{key: _root([row[key] for row in places[layer]]) for key in keys},
        }
        for layer in order
    ]


def _root(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sqrt(sum(value * value for value in known)) if len(known) == len(values) else None
