"""What the library keeps: vectors, task vectors, recipes, attachments, attestations, leases."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from vectors.errors import (
    GrammarError,
    InputError,
    ModelMismatch,
    NameNotFound,
    NameTaken,
    OutOfSpace,
    ShapeMismatch,
    StoreCorrupt,
)
from vectors.store import Library
from vectors.store.manifests import Manifest
from vectors.tasks import Recipe
from vectors.types import SteeringVector

Make = Callable[..., SteeringVector]
BASE = "ba" * 32


def weights(seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(3, 5, generator=rng).bfloat16(),
        "b": torch.randn(7, generator=rng),
        "c": torch.zeros(2),
    }


def test_a_vector_comes_back_with_its_files(library: Library, vector: Make) -> None:
    given = vector(3, note=("a", 1))
    entry = library.save_vector("cheerful", given, files={"plot.json": b"{}"}, parents=["c" * 64])
    found, loaded = library.load_vector("cheerful")
    assert found == entry
    assert torch.equal(loaded.directions[1], given.directions[1])
    assert (loaded.base, loaded.mean_norms, loaded.best_block) == (BASE, {1: 2.0}, 1)
    assert loaded.info == entry.info == {"seed": 3, "note": ["a", 1]}
    assert library.read_file(entry, "plot.json") == b"{}"
    assert torch.equal(library.vector_by_digest(entry.digest).directions[1], given.directions[1])
    with pytest.raises(NameNotFound, match=r"no file 'none'; it has plot.json, vector.safetensors"):
        library.read_file(entry, "none")


def test_equal_vectors_have_one_digest(library: Library, vector: Make, tmp_path: Path) -> None:
    digest = library.save_vector("cheerful", vector()).digest
    assert library.put_vector(vector()) == digest
    assert Library(tmp_path / "elsewhere").put_vector(vector()) == digest


def test_golden_digest(library: Library) -> None:
    vector = SteeringVector(BASE, {0: torch.tensor([0.6, 0.8])}, {0: 1.5}, 0, {"method": "pca"})
    assert library.put_vector(vector).startswith("d4486d92bb61ae5a")


def test_golden_manifest() -> None:
    manifest = Manifest.of(kind="recipe", base=BASE, files={}, info={"b": 1.0, "a": None})
    assert manifest.to_json() == (
        b'{"base":"' + BASE.encode() + b'","files":{},"info":{"a":null,"b":1.0},"kind":"recipe",'
        b'"parents":[],"schema":1,"tensors":{}}'
    )


def test_tasks_come_back_bit_for_bit(library: Library) -> None:
    base, tuned = weights(0), weights(1)
    tuned["b"][0] = float("nan")
    seen: list[float] = []
    entry = library.save_task(
        "baked", BASE, base, tuned, info={"steps": 3}, progress=lambda share, _: seen.append(share)
    )
    assert set(entry.manifest.tensors) == {"a", "b"}  # "c" is unchanged and takes no space
    part = entry.manifest.tensors["a"]
    assert (part.dtype, part.shape, part.changed) == ("BF16", (3, 5), 15)
    assert entry.manifest.tensors["b"].norm is None
    assert seen == sorted(seen)
    for name in base:
        back = library.tuned_tensor(entry.manifest, name, base[name])
        assert torch.equal(back.view(torch.uint8), tuned[name].view(torch.uint8))
    assert (
        library.save_task("again", BASE, base.__getitem__, tuned, info={"steps": 3}).digest
        == entry.digest
    )
    with pytest.raises(StoreCorrupt, match="'a' does not come back as it was saved"):
        library.tuned_tensor(entry.manifest, "a", tuned["a"])
    with pytest.raises(ShapeMismatch, match="'a' as BF16"):
        library.tuned_tensor(entry.manifest, "a", base["b"])


def test_tasks_that_do_not_fit_the_base(library: Library) -> None:
    base = weights(0)
    with pytest.raises(ShapeMismatch, match="'lm_head' that the base lacks"):
        library.save_task("t", BASE, base, {"lm_head": torch.ones(1)})
    with pytest.raises(ShapeMismatch, match=r"'a'.*cast it first"):
        library.save_task("t", BASE, base, {"a": base["a"].float()})
    with pytest.raises(InputError, match="64 hex digits"):
        library.save_task("t", "smollm2", base, {})
    assert library.list() == []


def test_recipes(library: Library) -> None:
    task = library.save_task("baked", BASE, weights(0), weights(1))
    recipe = Recipe(base=BASE, terms=((task.digest, -0.5),))
    entry = library.save_recipe("unbaked", recipe, info={"written": "baked=-0.5"})
    assert entry.info["terms"] == [[task.digest, -0.5]]
    assert entry.info["written"] == "baked=-0.5"
    assert entry.manifest.parents == (task.digest,)
    assert library.load_recipe("unbaked") == (entry, recipe)
    with pytest.raises(NameNotFound, match="has the digest cccc"):
        library.save_recipe("r", Recipe(base=BASE, terms=(("c" * 64, 1.0),)))
    with pytest.raises(ModelMismatch, match="belongs to base babababababa"):
        library.save_recipe("r", Recipe(base="d" * 64, terms=((task.digest, 1.0),)))


def test_one_name_space_for_all_kinds(library: Library, vector: Make) -> None:
    library.save_vector("cheerful", vector())
    with pytest.raises(NameTaken, match="'cheerful' belongs to a steering-vector"):
        library.save_task("cheerful", BASE, weights(0), weights(1))
    library.save_task("baked", BASE, weights(0), weights(1))
    assert [e.name for e in library.list()] == ["baked", "cheerful"]
    assert [e.name for e in library.list("task-vector")] == ["baked"]
    with pytest.raises(NameNotFound, match="'baked' is a task-vector"):
        library.load_vector("baked")
    with pytest.raises(NameNotFound, match="is a task-vector"):
        library.vector_by_digest(library.get("baked").digest)


@pytest.mark.parametrize("name", ["../x", "", ".x", "a/b", "x" * 101])
def test_attachments_have_plain_names(library: Library, vector: Make, name: str) -> None:
    with pytest.raises(InputError, match="plain file names"):
        library.save_vector("cheerful", vector(), files={name: b""})
    with pytest.raises(InputError, match="cannot be called vector"):
        library.save_vector("cheerful", vector(), files={"vector.safetensors": b""})


def test_attestations_stand_beside_the_entry(library: Library, vector: Make) -> None:
    digest = library.save_vector("cheerful", vector()).digest
    library.attest(digest, "verdict", {"passed": False})
    library.attest(
        digest, "verdict", {"passed": True, "doses": (0.1, 0.2)}, files={"p.json": b"[]"}
    )
    library.attest(digest, "evaluation", {"kl": 0.01})
    assert [v["passed"] for v in library.attestations(digest, "verdict")] == [False, True]
    newest = library.attestations(digest, "verdict")[-1]
    assert newest["doses"] == [0.1, 0.2]
    assert library.objects.read(newest["attested"]["files"]["p.json"]) == b"[]"
    assert len(library.attestations(digest)) == 3
    assert library.get("cheerful").digest == digest
    assert library.attestations("0" * 64) == []
    with pytest.raises(NameNotFound):
        library.attest("0" * 64, "verdict", {})
    with pytest.raises(InputError, match="JSON"):
        library.attest(digest, "verdict", {"x": float("nan")})
    with pytest.raises(InputError, match="'attested'"):
        library.attest(digest, "verdict", {"attested": 1})
    with pytest.raises(GrammarError, match="kind of attestation"):
        library.attest(digest, "../v", {})


def test_what_is_in_use_is_not_deleted(library: Library, vector: Make) -> None:
    digest = library.save_vector("cheerful", vector(1)).digest
    library.save_vector("cheerful", vector(2))
    with library.lease(digest, "the engine"):
        with pytest.raises(NameTaken, match=rf"in use by the engine \(process {os.getpid()}\)"):
            library.delete("cheerful")
        library.delete("cheerful", force=True)
        library.restore("cheerful")
    library.delete("cheerful")


def test_leases_end_with_their_time_and_their_process(library: Library, vector: Make) -> None:
    digest = library.save_vector("cheerful", vector()).digest
    with library.lease(digest, "slow", seconds=-1):
        library.delete("cheerful")
    library.restore("cheerful")
    if (child := os.fork()) == 0:
        library.lease(digest, "killed").__enter__()
        os._exit(0)
    os.waitpid(child, 0)
    library.delete("cheerful")


def test_disk_use(library: Library, vector: Make) -> None:
    entry = library.save_vector("cheerful", vector(), files={"x.json": b"1234"})
    assert library.disk_use(entry) == library.total_use()
    library.save_vector("twin", vector(), files={"x.json": b"1234"})
    assert library.disk_use(entry) == library.total_use()


def test_damage_is_named(library: Library, vector: Make) -> None:
    entry = library.save_vector("cheerful", vector())
    stored = library.objects.path(entry.manifest.files["vector.safetensors"])
    stored.chmod(0o644)
    stored.write_bytes(b"?")
    with pytest.raises(StoreCorrupt, match="damaged"):
        library.load_vector("cheerful")
    manifest = library.manifests.path(entry.digest)
    manifest.chmod(0o644)
    manifest.write_text(json.dumps({"schema": 2}))
    with pytest.raises(StoreCorrupt, match=f"'cheerful@1'.*manifest {entry.digest[:12]}"):
        library.get("cheerful")
    library.save_vector("cheerful", vector())
    assert library.get("cheerful@1") == entry


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutOfSpace, match="choose a folder"):
        Library(tmp_path / "file" / "library")


def test_a_database_that_is_none_or_newer(library: Library, tmp_path: Path) -> None:
    with library._database.change() as db:
        db.execute("PRAGMA user_version = 9")
    with pytest.raises(StoreCorrupt, match="newer workbench"):
        Library(library.root)
    other = tmp_path / "other"
    Library(other)
    for file in other.glob("store.db*"):
        file.unlink()
    (other / "store.db").write_bytes(b"not a database, but long enough to be looked at" * 9)
    with pytest.raises(StoreCorrupt, match="damaged"):
        Library(other)


HALF = "caf\udce9"  # a file's name that is no UTF-8


def nested(depth: int) -> list[object]:
    found: list[object] = []
    for _ in range(depth):
        found = [found]
    return found


@pytest.mark.parametrize("info", [{"folder": HALF}, {HALF: 1}, {"deep": nested(400)}])
def test_what_could_not_be_read_again_is_not_begun(
    library: Library, vector: Make, info: dict[str, object]
) -> None:
    with pytest.raises(InputError):
        library.save_vector("odd", vector(0, **info))
    entry = library.save_vector("sound", vector(0))
    with pytest.raises(InputError):
        library.attest(entry.digest, "note", info)
    assert [entry.name for entry in library.list()] == ["sound"]
    assert library.attestations(entry.digest) == [] and library.fsck().clean
    library.gc(retention=0, grace=0)


@pytest.mark.parametrize("loss", ["empty", "gone"])
def test_a_database_that_is_lost_is_no_new_library(
    library: Library, vector: Make, loss: str
) -> None:
    library.save_vector("kind", vector(0))
    for path in library.root.glob("store.db*"):
        path.unlink()
    if loss == "empty":
        (library.root / "store.db").touch()
    with pytest.raises(StoreCorrupt, match="entries lie beside it"):
        Library(library.root)


def test_what_sqlite_cannot_hold_is_bad_input(library: Library, vector: Make) -> None:
    library.save_vector("kind", vector(0))
    doors: list[tuple[Callable[..., object], object]] = [
        (library.log, 10**30),
        (library.delete, HALF),
        (library.restore, HALF),
        (partial(library.untag, HALF), "tag"),
        (partial(library.pin, "kind"), HALF),
    ]
    for door, what in doors:
        with pytest.raises(InputError):
            door(what)
    assert [entry.name for entry in library.list()] == ["kind"] and not library.pins()


def test_a_recipe_that_is_none_is_told(library: Library) -> None:
    good = Recipe(base=BASE, terms=()).model_dump(mode="json")
    stray = {**good, "terms": [["00" * 32, 1.0]]}
    for number, info in enumerate(({}, {**good, "terms": 5}, stray, {**good, "base": "cd" * 32})):
        manifest = Manifest.of(kind="recipe", base=BASE, files={}, info=info)
        library._save(f"r{number}", manifest)
        with pytest.raises(StoreCorrupt, match="save it again"):
            library.load_recipe(f"r{number}")
    assert {fault.kind for fault in library.fsck().faults} == {"untrue"}
    with pytest.raises(GrammarError, match="1e\\+39"):
        Recipe(base=BASE, terms=(("00" * 32, 1e39),))
