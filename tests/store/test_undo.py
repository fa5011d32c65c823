"""Undo: every change has its opposite, the latest goes first, and the log keeps both."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from vectors.errors import InputError, NameNotFound, NameTaken
from vectors.store import Library
from vectors.types import SteeringVector

Make = Callable[..., SteeringVector]


def state(library: Library) -> tuple[object, ...]:
    """What names, tags and pins mean, without numbers that only count."""
    names = {entry.name: entry.digest for entry in library.list()}
    tags = {
        f"{name}@{tag}": library.get(f"{name}@{tag}").digest
        for name in names
        for tag in library.tags(name)
    }
    return names, tags, {(pin.digest, pin.reason) for pin in library.pins()}


def test_a_walk_back_meets_every_state_again(library: Library, vector: Make) -> None:
    acts: list[Callable[[], object]] = [
        lambda: library.save_vector("kind", vector(1)),
        lambda: library.save_vector("kind", vector(2)),
        lambda: library.tag("kind@1", "good"),
        lambda: library.tag("kind@2", "good", move=True),
        lambda: library.rename("kind", "warm"),
        lambda: library.tag("warm@1", "good", move=True),
        lambda: library.pin("warm", "first"),
        lambda: library.pin("warm", "second"),
        lambda: library.revert("warm"),
        lambda: library.delete("warm"),
        lambda: library.restore("warm"),
        lambda: library.unpin("warm@2"),
        lambda: library.untag("warm", "good"),
        lambda: library.save_vector("other", vector(3)),
    ]
    states = []
    for act in acts:
        states.append(state(library))
        act()
    after = library.log()[0]
    for before in reversed(states):
        library.undo()
        assert state(library) == before
    with pytest.raises(InputError, match="Nothing is left to undo"):
        library.undo()
    rows = library.log(1000)
    assert len(rows) == 2 * len(acts) and rows[-len(acts)].id == after.id
    assert {row.undoes for row in rows[: len(acts)]} == {row.id for row in rows[len(acts) :]}
    assert library.fsck().clean


@pytest.mark.parametrize("seed", range(8))
def test_any_walk_back_meets_every_state_again(library: Library, vector: Make, seed: int) -> None:
    rng, states = random.Random(seed), []
    for _ in range(40):
        name, other = rng.choices(("a-name", "b-name", "c-name"), k=2)
        number = rng.randrange(3)
        acts: list[tuple[Callable[..., object], tuple[object, ...]]] = [
            (library.save_vector, (name, vector(number))),
            (library.rename, (name, other)),
            (library.delete, (name,)),
            (library.restore, (name,)),
            (library.revert, (name,)),
            (partial(library.tag, move=True), (f"{name}@{number + 1}", "good")),
            (library.untag, (name, "good")),
            (library.pin, (name, f"reason {number}")),
            (library.unpin, (name,)),
        ]
        act, given = rng.choice(acts)
        before = state(library)
        try:
            act(*given)
        except (NameNotFound, NameTaken, InputError):
            assert state(library) == before
        else:
            states.append(before)
        if states and rng.random() < 0.2:
            library.undo()
            assert state(library) == states.pop()
    while states:
        library.undo()
        assert state(library) == states.pop()


def test_undo_skips_what_was_undone(library: Library, vector: Make) -> None:
    library.save_vector("one", vector(1))
    library.save_vector("two", vector(2))
    assert library.undo().name == "two"
    library.save_vector("three", vector(3))
    assert [library.undo().name for _ in range(2)] == ["three", "one"]
    assert library.list() == [] and library.last_change() is None
    assert library.restore("two").digest


def test_only_what_was_seen_is_undone(library: Library, vector: Make) -> None:
    library.save_vector("one", vector(1))
    seen = library.last_change()
    assert seen is not None and (seen.action, seen.name) == ("save", "one")
    library.save_vector("two", vector(2))
    with pytest.raises(InputError, match=r"another one by now \(save 'two'\)"):
        library.undo(seen.id)
    assert {entry.name for entry in library.list()} == {"one", "two"}
    library.undo()
    library.undo(seen.id)
    assert library.list() == []


def test_what_is_in_use_does_not_go(library: Library, vector: Make) -> None:
    entry = library.save_vector("one", vector(1))
    with library.lease(entry.digest, "a run"), pytest.raises(NameTaken, match="in use by a run"):
        library.undo()
    assert library.get("one").digest == entry.digest and library.last_change() is not None


def test_a_pull_is_not_undone_by_guessing(library: Library, vector: Make, tmp_path: Path) -> None:
    pytest.importorskip("obstore", reason="push and pull need obstore")
    other = Library(tmp_path / "other")
    other.save_vector("theirs", vector(1))
    other.push(str(tmp_path / "copy"))
    library.pull(str(tmp_path / "copy"))
    with pytest.raises(InputError, match="A pull cannot be undone at once"):
        library.undo()
    assert library.get("theirs").revision == 1
