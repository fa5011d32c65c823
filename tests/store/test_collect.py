"""The collector removes what nothing means, spares the rest, and says beforehand what would go."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vectors.errors import BackendUnavailable, InputError, NameNotFound, StoreCorrupt
from vectors.store import Library, gate
from vectors.store.leases import DAY
from vectors.tasks import Recipe
from vectors.types import SteeringVector

Make = Callable[..., SteeringVector]
BASE = "ba" * 32


def age(library: Library, days: float) -> None:
    """Make every file of the library older."""
    for path in library.root.rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() - days * DAY,) * 2)


def files(library: Library) -> set[str]:
    folders = (library.objects.root, library.manifests.root)
    return {path.stem for folder in folders for path in folder.rglob("*") if path.is_file()}


def test_what_is_meant_stays(library: Library, vector: Make) -> None:
    library.save_vector("named", vector(1), files={"x.json": b"1"})
    library.save_vector("named", vector(2))
    pinned = library.put_vector(vector(3))
    library.pin(pinned)
    leased = library.put_vector(vector(4))
    library.save_vector("deleted", vector(5))
    library.delete("deleted")
    base = {"a": torch.zeros(3)}
    task = library.save_task("task", BASE, base, {"a": torch.ones(3)}, parents=["c" * 64])
    library.save_recipe("recipe", Recipe(base=BASE, terms=((task.digest, 1.0),)))
    library.delete("task")
    library.attest(pinned, "verdict", {"passed": True}, files={"plot.json": b"{}"})
    age(library, 60)
    before = files(library)
    with library.lease(leased, "the engine"):
        assert library.gc().bytes == 0
        assert files(library) == before
    # The recipe still needs the task vector long after its name has gone.
    found = library.gc(retention=0)
    assert found.names == ("deleted", "task")
    assert set(found.manifests) == {leased, *found.manifests} and len(found.manifests) == 2
    assert library.load_recipe("recipe")[1].terms == ((task.digest, 1.0),)
    assert library.tuned_tensor(task.manifest, "a", base["a"]).tolist() == [1, 1, 1]
    assert library.attestations(pinned)[0]["passed"]
    assert library.get("named@1").info["seed"] == 1
    with pytest.raises(NameNotFound, match="Nothing called 'deleted' was deleted"):
        library.restore("deleted")
    assert library.save_vector("deleted", vector(6)).revision == 2
    assert library.fsck().clean


def test_the_young_stay_with_all_they_need(library: Library, vector: Make) -> None:
    digest = library.put_vector(vector())
    stored = library.get(digest).manifest.objects()
    for one in stored:
        os.utime(library.objects.path(one), (1, 1))
    assert library.gc(retention=0).bytes == 0
    age(library, 13)
    assert library.gc(retention=0).bytes == 0
    age(library, 15)
    planned = library.gc(retention=0, dry_run=True)
    assert planned.dry_run and planned.manifests == (digest,) and planned.objects == stored
    assert planned.bytes == library.total_use() > 0
    assert digest in files(library)
    done = library.gc(retention=0)
    assert (done.manifests, done.objects, done.bytes) == ((digest,), stored, planned.bytes)
    assert files(library) == set()


def test_retention_keeps_what_was_deleted_lately(library: Library, vector: Make) -> None:
    library.save_vector("cheerful", vector())
    library.delete("cheerful")
    age(library, 60)
    assert library.gc(retention=DAY, grace=0).bytes == 0
    assert library.restore("cheerful").revision == 1


def test_saving_again_makes_old_bytes_young(library: Library, vector: Make) -> None:
    digest = library.put_vector(vector())
    age(library, 60)
    assert library.put_vector(vector()) == digest
    assert library.gc(retention=0).bytes == 0


def test_leftovers_of_killed_writers_go(library: Library) -> None:
    left = library.objects.root / ".0123.tmp"
    left.write_bytes(b"half")
    assert library.gc(grace=0).leftovers == 0  # its writer may be at it
    age(library, 15)
    assert library.fsck().leftovers == 1
    assert (library.gc().leftovers, left.exists()) == (1, False)


@pytest.mark.parametrize("loss", ["damage", "absence"])
def test_damage_on_the_way_stops_it(library: Library, vector: Make, loss: str) -> None:
    entry = library.save_vector("cheerful", vector(1))
    library.put_vector(vector(2))
    age(library, 60)
    path = library.manifests.path(entry.digest)
    path.unlink()
    if loss == "damage":
        path.write_bytes(b"{}")
    before = files(library)
    with pytest.raises(StoreCorrupt, match="Nothing is collected"):
        library.gc(retention=0, grace=0)
    assert files(library) == before


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_times_that_are_none(library: Library, wrong: float) -> None:
    with pytest.raises(InputError, match="retention"):
        library.gc(retention=wrong)
    with pytest.raises(InputError, match="grace"):
        library.gc(grace=wrong)


def test_strays_are_left_to_fsck(library: Library) -> None:
    stray = library.objects.root / "README"
    stray.write_text("mine")
    (library.manifests.root / "notes.txt").write_text("mine")
    age(library, 60)
    library.gc(retention=0, grace=0)
    assert stray.read_text() == "mine"


def test_a_writer_at_work_is_waited_for(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "PATIENCE", 0.05)
    other = Library(library.root)
    with library._gate.shared(), library._gate.shared():
        with pytest.raises(BackendUnavailable, match="has been saving"):
            other.gc()
        assert other.gc(dry_run=True).bytes == 0
    assert other.gc().bytes == 0


def test_the_gate_outlives_nobody(library: Library, tmp_path: Path) -> None:
    if (child := os.fork()) == 0:
        library._gate.alone().__enter__()
        os._exit(0)
    os.waitpid(child, 0)
    library.gc()


def test_what_was_collected_early_holds_no_later_collection_up(
    library: Library, vector: Make
) -> None:
    library.save_vector("kept", vector(0))
    library.save_vector("gone", vector(1))
    library.delete("gone")
    assert library.gc(retention=0, grace=0).names == ("gone",)
    assert library.fsck().clean
    assert not library.gc().manifests and not library.gc(dry_run=True).manifests
    # Nor does it stand before older changes that can be undone.
    assert library.undo().name == "kept"
