"""A steering text is looked up once, and at once again when the library has changed."""

from __future__ import annotations

import pytest

from vectors.errors import BlockNotFound, GrammarError, NameNotFound, ShapeMismatch, StoreCorrupt
from vectors.steering.controls import random_direction
from vectors.store import Library
from vectors.types import SteeringVector
from workbench.engines.vllm.resolver import KEPT, Resolver, Shape
from workbench.engines.vllm.spec import resolve_request

BASE = "0" * 64


def vector(seed):
    directions = {b: random_direction(8, 10 * seed + b) for b in range(3)}
    return SteeringVector(BASE, directions, dict.fromkeys(directions, 2.0), 1)


class Counted(Library):
    looks = 0

    def load_vector(self, ref):
        self.looks += 1
        return super().load_vector(ref)


@pytest.fixture
def library(tmp_path):
    found = Counted(tmp_path / "library")
    for seed, name in enumerate(("calm", "loud")):
        found.save_vector(name, vector(seed))
    return found


TEXTS = [
    "calm=0.5",
    "calm=0.5:0-2/decode,loud=-1:2!ablate",
    '{"terms": [{"name": "loud", "dose": 1.5, "blocks": [0, 2]}], "start": 4}',
    "calm=0",
]


def test_it_resolves_as_without_memory_and_looks_once(library):
    resolve = Resolver(library, BASE)
    for _ in range(3):
        assert [resolve(text) for text in TEXTS] == [
            resolve_request(text, Library(library.root), BASE) for text in TEXTS
        ]
    assert library.looks == 2
    assert resolve("calm=0.25").injections[0].dose == 0.25
    assert library.looks == 2, "another dose of a vector that it knows"


def test_a_name_that_means_another_vector_is_seen_at_once(library):
    resolve = Resolver(library, BASE)
    other = Library(library.root)
    other.tag("calm@1", "good")
    seen = set()
    for seed in range(5, 9):
        digest = other.save_vector("calm", vector(seed)).digest
        for _ in range(2):
            assert resolve("calm=1").injections[0].vector == digest
        other.tag(f"calm@{seed - 3}", "good", move=True)
        assert resolve("calm@good=1").injections[0].vector == digest
        seen.add(digest)
    assert len(seen) == 4
    other.delete("calm")
    with pytest.raises(NameNotFound):
        resolve("calm=1")
    other.restore("calm")
    assert resolve("calm=1").injections[0].vector == digest


def test_what_is_wrong_is_wrong_each_time_and_found_when_it_is_there(library):
    resolve = Resolver(library, BASE)
    for _ in range(2):
        for text, error in (("mild=1", NameNotFound), ("calm=1:9", BlockNotFound)):
            with pytest.raises(error):
                resolve(text)
        for text in ("calm", 5, ["calm=1"], None):
            with pytest.raises(GrammarError):
                resolve(text)
    library.save_vector("mild", vector(7))
    assert resolve("mild=1").injections


@pytest.mark.parametrize("harm", ["missing", "truncated", "altered"])
@pytest.mark.parametrize("what", ["manifests", "objects"])
def test_a_file_that_is_harmed_is_seen_at_once_and_so_is_its_return(library, what, harm):
    resolve = Resolver(library, BASE)
    wanted = resolve("calm=1")
    manifest = library.get("calm").manifest
    paths = {
        "manifests": library.manifests.path(library.get("calm").digest),
        "objects": library.objects.path(manifest.objects()[0]),
    }
    path = paths[what]
    path.chmod(0o644)
    data = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-7] if harm == "truncated" else data[:-7] + b"0000000")
    for text in ("calm=1", "calm=1", "loud=1,calm=2"):
        with pytest.raises((StoreCorrupt, NameNotFound)):
            resolve(text)
    assert resolve("loud=1").injections, "others go on"
    path.write_bytes(data)
    assert resolve("calm=1") == wanted


def test_what_it_remembers_is_bounded(library):
    resolve = Resolver(library, BASE)
    for n in range(KEPT + 20):
        resolve(f"calm=0.{n + 1:04}")
    assert len(resolve._texts) == KEPT
    assert resolve(f"calm=0.{KEPT:04}") is resolve(f"calm=0.{KEPT:04}")


CONDITION = (
    '{"terms": [{"name": "calm", "dose": 1, "blocks": [0], "phase": "decode"}], "condition": %s}'
)


def test_a_vector_that_does_not_fit_the_model_is_refused_each_time(library):
    resolve = Resolver(library, BASE)
    aside = CONDITION % '{"name": "loud", "block": 2, "above": 0}'
    for _ in range(2):
        for text in ("calm=1", "loud=1:2", aside):
            assert resolve(text, Shape(8, 3)) == resolve(text)
            with pytest.raises(ShapeMismatch, match="has width 8 and this model 16"):
                resolve(text, Shape(16, 3))
        for text in ("calm=1:0-2", "loud=1:2,calm=1:0", aside):
            with pytest.raises(BlockNotFound, match="at block 2; this model has 2 blocks"):
                resolve(text, Shape(8, 2))
        assert resolve("loud=1:1", Shape(8, 2)).injections
    assert resolve.vector("calm").width == 8
