"""Lineage: what an entry comes from, its revisions, and what was made of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vectors.errors import NameNotFound
from vectors.store import Library
from vectors.tasks import Recipe
from vectors.types import SteeringVector

Make = Callable[..., SteeringVector]
BASE = "ba" * 32


@pytest.fixture
def grown(library: Library, vector: Make) -> Library:
    """Two vectors, a task vector of each, a recipe of both, and a stranger."""
    base = {"t": torch.zeros(4)}
    for number, name in enumerate(("kind", "calm")):
        parent = library.save_vector(name, vector(number)).digest
        tuned = {"t": torch.full((4,), number + 1.0)}
        library.save_task(f"{name}-baked", BASE, base, tuned, parents=[parent])
    library.save_vector("kind", vector(7))
    terms = tuple(
        (library.get(f"{name}-baked").digest, w) for name, w in (("kind", 1.0), ("calm", -0.5))
    )
    library.save_recipe("both", Recipe(base=BASE, terms=terms))
    library.save_vector("stranger", vector(9))
    return library


def links(library: Library, ref: str) -> set[tuple[str, str, str, float | None]]:
    return {(k.source, k.target, k.how, k.weight) for k in library.lineage(ref).links}


def test_ancestors_and_heirs_and_revisions(grown: Library) -> None:
    found = grown.lineage("kind")
    assert found.entry == "kind@2" and found.left_out == 0
    # The recipe's other ingredient is no relation of `kind`.
    assert [p.key for p in found.places] == ["kind@1", "kind-baked@1", "kind@2", "both@1"]
    assert links(grown, "kind@1") == {
        ("kind@1", "kind-baked@1", "made of", None),
        ("kind-baked@1", "both@1", "made of", 1.0),
        ("kind@1", "kind@2", "next revision", None),
    }
    assert {p.key for p in grown.lineage("both").places} == {
        *("kind@1", "calm@1", "kind-baked@1", "calm-baked@1", "both@1"),
    }
    assert ("calm-baked@1", "both@1", "made of", -0.5) in links(grown, "both")
    assert [p.key for p in grown.lineage("stranger").places] == ["stranger@1"]


def test_what_has_no_name_any_more_is_still_an_ancestor(grown: Library) -> None:
    digest = grown.get("kind@1").digest
    grown.delete("kind")
    places = {p.key: p for p in grown.lineage("both").places}
    assert places[digest[:12]].kind == "steering-vector" and places[digest[:12]].created == ""
    assert (digest[:12], "kind-baked@1", "made of", None) in links(grown, "both")
    grown.manifests.path(digest).unlink()
    from vectors.store import lineage

    lineage._read.cache_clear()
    assert {p.key: p for p in grown.lineage("both").places}[digest[:12]].kind == ""
    assert {p.key for p in grown.lineage(grown.get("both").digest[:12]).places} == set(places)


def test_a_revert_is_a_place_of_its_own(grown: Library) -> None:
    grown.revert("kind")
    found = links(grown, "kind")
    assert ("kind@2", "kind@3", "next revision", None) in found
    assert ("kind@1", "kind-baked@1", "made of", None) in found
    assert not any(source == "kind@3" for source, *_ in found)


def test_too_much_is_counted(grown: Library) -> None:
    assert [p.key for p in grown.lineage("kind", most=1).places] == ["kind@2"]
    found = grown.lineage("kind", most=3)
    assert len(found.places) == 3 and found.left_out == 1
    assert {k.source for k in found.links} | {k.target for k in found.links} <= {
        p.key for p in found.places
    }


def test_nothing_by_that_name(grown: Library) -> None:
    with pytest.raises(NameNotFound):
        grown.lineage("nobody")
