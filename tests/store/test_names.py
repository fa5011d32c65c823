"""Names, revisions, and the log."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vectors.errors import GrammarError, NameNotFound, NameTaken
from vectors.store import Library, changes
from vectors.store.reference import Reference, parse_reference
from vectors.types import SteeringVector

Make = Callable[..., SteeringVector]


def test_every_save_is_a_revision(library: Library, vector: Make) -> None:
    first, second = (library.save_vector("cheerful", vector(n)) for n in (1, 2))
    again = library.save_vector("cheerful", vector(1))
    assert [e.revision for e in library.history("cheerful")] == [3, 2, 1]
    assert first.digest == again.digest != second.digest
    assert library.get("cheerful").revision == 3
    assert library.get("cheerful@2") == second
    assert library.get(f"cheerful@{second.digest[:8]}") == second
    assert library.get(f"cheerful@{first.digest}").revision == 3


def test_digests_are_refs(library: Library, vector: Make) -> None:
    entry = library.save_vector("cheerful", vector())
    assert library.get(entry.digest) == library.get(entry.digest[:8]) == entry
    unnamed = library.put_vector(vector(7))
    found = library.get(unnamed)
    assert (found.name, found.revision, found.created) == (unnamed[:12], 0, "")
    assert library.get(found.name) == found
    assert [e.name for e in library.list()] == ["cheerful"]


def test_dates(library: Library, vector: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for day in ("2026-11-20", "2026-11-22", "2026-11-22"):
        monkeypatch.setattr(changes, "now", lambda day=day: f"{day}T23:59:59.000+00:00")
        library.save_vector("cheerful", vector())
    assert library.get("cheerful@2026-11-21").revision == 1
    assert library.get("cheerful@2026-11-22").revision == 3
    with pytest.raises(NameNotFound, match="nothing at '@2026-11-19'"):
        library.get("cheerful@2026-11-19")


def test_references_parse() -> None:
    assert parse_reference("a@12") == Reference("a", revision=12)
    assert parse_reference("a@2026-11-22") == Reference("a", until="2026-11-22")
    assert parse_reference("a@12345678") == Reference("a", digest="12345678")
    for text in (
        "a@",
        "a@0",
        "a@X",
        "a@2026-13-01",
        "a@1@2",
        "@1",
        "../a",
        "A",
        "a b",
        "",
        "a@b/..",
    ):
        with pytest.raises(GrammarError):
            parse_reference(text)


@pytest.mark.parametrize("name", ["../x", "", "A", "a/b", "deadbeef", "0" * 64, "x" * 101, "a\n"])
def test_names_that_nothing_can_have(library: Library, vector: Make, name: str) -> None:
    library.save_vector("good", vector())
    for action in (
        lambda: library.save_vector(name, vector()),
        lambda: library.rename("good", name),
    ):
        with pytest.raises(GrammarError):
            action()
    assert [e.name for e in library.list()] == ["good"]


def test_what_is_not_there(library: Library, vector: Make) -> None:
    library.save_vector("cheerful", vector())
    with pytest.raises(NameNotFound, match="did you mean 'cheerful'"):
        library.get("cheeful")
    with pytest.raises(NameNotFound, match="library list"):
        library.get("0" * 64)
    with pytest.raises(NameNotFound, match="nothing at '@9'"):
        library.get("cheerful@9")
    with pytest.raises(NameNotFound, match="is a steering-vector, and a task-vector or recipe"):
        library.get("cheerful", kind=("task-vector", "recipe"))
    for action in (library.history, library.delete, library.restore):
        with pytest.raises(NameNotFound):
            action("x'; DROP TABLE refs; --")
    assert library.get("cheerful").revision == 1


def test_rename_keeps_history(library: Library, vector: Make) -> None:
    library.save_vector("old", vector(1))
    library.save_vector("old", vector(2))
    library.save_vector("other", vector(3))
    with pytest.raises(NameTaken, match="'other' is in use"):
        library.rename("old", "other")
    library.rename("old", "new")
    assert [e.revision for e in library.history("new")] == [2, 1]
    with pytest.raises(NameNotFound):
        library.get("old")
    assert library.log(1)[0].action == "rename"
    assert library.log(1)[0].detail == "to new"


def test_delete_and_restore(library: Library, vector: Make) -> None:
    first = library.save_vector("cheerful", vector(1))
    library.delete("cheerful")
    assert library.list() == []
    with pytest.raises(NameNotFound, match="was deleted; bring it back"):
        library.get("cheerful")
    assert library.get(first.digest).revision == 0
    assert library.restore("cheerful") == first
    with pytest.raises(NameNotFound, match="Nothing called 'cheerful' was deleted"):
        library.restore("cheerful")
    assert [row.action for row in library.log()] == ["restore", "delete", "save"]


def test_a_deleted_name_that_is_used_again_counts_on(library: Library, vector: Make) -> None:
    first = library.save_vector("cheerful", vector(1))
    library.delete("cheerful")
    assert library.save_vector("cheerful", vector(2)).revision == 2
    with pytest.raises(NameNotFound, match="nothing at '@1'"):
        library.get("cheerful@1")
    with pytest.raises(NameTaken, match="in use again"):
        library.restore("cheerful")
    library.rename("cheerful", "newer")
    assert library.restore("cheerful") == first
