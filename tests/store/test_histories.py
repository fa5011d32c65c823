"""Tags, pins, revert, and what differs between two entries."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vectors.errors import GrammarError, InputError, NameNotFound, NameTaken, StoreCorrupt
from vectors.store import Library, database
from vectors.types import SteeringVector

Make = Callable[..., SteeringVector]
BASE = "ba" * 32


def test_tags_are_refs(library: Library, vector: Make) -> None:
    for seed in (1, 2, 3):
        library.save_vector("cheerful", vector(seed))
    library.tag("cheerful@2", "stable")
    assert library.get("cheerful@stable") == library.get("cheerful@2")
    library.tag("cheerful@2", "stable")
    with pytest.raises(NameTaken, match="'cheerful@stable' is revision 2"):
        library.tag("cheerful", "stable")
    library.tag("cheerful", "stable", move=True)
    assert library.get("cheerful@stable").revision == 3
    library.rename("cheerful", "glad")
    assert library.tags("glad") == {"stable": 3}
    library.untag("glad", "stable")
    assert library.tags("glad") == {}
    with pytest.raises(NameNotFound, match="nothing at '@stable'"):
        library.get("glad@stable")
    with pytest.raises(NameNotFound, match="no tag 'glad@stable'"):
        library.untag("glad", "stable")
    actions = [(row.action, row.detail) for row in library.log(3)]
    assert actions == [("untag", "stable"), ("rename", "to glad"), ("tag", "stable")]


@pytest.mark.parametrize("tag", ["", "3", "Stable", "deadbeef", "2026-11-22", "a b", "../x", "-a"])
def test_what_cannot_be_a_tag(library: Library, vector: Make, tag: str) -> None:
    library.save_vector("cheerful", vector())
    with pytest.raises(GrammarError, match="cannot be a tag"):
        library.tag("cheerful", tag)


def test_a_tag_needs_a_name(library: Library, vector: Make) -> None:
    digest = library.put_vector(vector())
    with pytest.raises(NameNotFound, match="has no name"):
        library.tag(digest, "stable")


def test_revert_is_a_new_revision(library: Library, vector: Make) -> None:
    first = library.save_vector("cheerful", vector(1))
    with pytest.raises(InputError, match="nothing before it"):
        library.revert("cheerful")
    library.save_vector("cheerful", vector(2))
    back = library.revert("cheerful@1")
    assert (back.revision, back.digest) == (3, first.digest)
    with pytest.raises(InputError, match="'cheerful@1' is what 'cheerful' means already"):
        library.revert("cheerful@1")
    assert library.revert("cheerful").digest == library.get("cheerful@2").digest
    assert [row.detail for row in library.log(2)] == ["to 2", "to 1"]
    with pytest.raises(NameNotFound):
        library.revert("cheerful@9")


def test_pins(library: Library, vector: Make) -> None:
    digest = library.put_vector(vector())
    library.pin(digest, "the paper's")
    assert [(p.digest, p.reason) for p in library.pins()] == [(digest, "the paper's")]
    library.unpin(digest)
    assert library.pins() == []
    with pytest.raises(NameNotFound, match="is not pinned"):
        library.unpin(digest)


def test_diff_reads_no_payload(library: Library) -> None:
    base = {n: torch.zeros(4, dtype=torch.bfloat16) for n in "abcd"}
    ones, twos = torch.ones(4).bfloat16(), torch.full((4,), 2.0).bfloat16()
    old = library.save_task("t", BASE, base, {"a": ones, "b": ones, "c": ones}, info={"n": 1})
    new = library.save_task("t", BASE, base, {"a": ones, "b": twos, "d": twos}, info={"n": 2})
    for entry in (old, new):
        for digest in entry.manifest.objects():
            library.objects.path(digest).unlink(missing_ok=True)
    found = library.diff("t@1", "t@2")
    assert (found.old, found.new, found.equal, found.same_base) == (
        old.digest,
        new.digest,
        False,
        True,
    )
    assert found.same == 1
    assert [(t.name, t.state, t.old_norm, t.new_norm, t.least, t.most) for t in found.tensors] == [
        ("b", "changed", 2.0, 4.0, 2.0, 6.0),
        ("c", "removed", 2.0, 0.0, 2.0, 2.0),
        ("d", "added", 0.0, 4.0, 4.0, 4.0),
    ]
    assert found.info == {"n": (1, 2)}
    # The bounds hold: the difference of b is one in each of four elements.
    assert 2.0 <= float((twos - ones).float().norm()) <= 6.0
    assert library.diff("t@2", "t@2").tensors == ()
    assert library.diff("t@2", "t@2").equal


def test_diff_without_a_common_base_or_a_finite_norm(library: Library) -> None:
    base = {"a": torch.zeros(3)}
    library.save_task("one", BASE, base, {"a": torch.ones(3)})
    library.save_task("other", "cd" * 32, base, {"a": torch.ones(3)})
    library.save_task("nan", BASE, base, {"a": torch.full((3,), float("nan"))})
    found = library.diff("one", "other")
    assert not found.same_base
    assert [(t.state, t.least) for t in found.tensors] == [("changed", None)]
    (row,) = library.diff("one", "nan").tensors
    assert (row.new_norm, row.least, row.most) == (None, None, None)


def test_lists_show_what_is_damaged(library: Library, vector: Make) -> None:
    library.save_vector("good", vector(1))
    bad = library.save_vector("bad", vector(2))
    library.manifests.path(bad.digest).unlink()
    assert [(e.name, e.kind) for e in library.list()] == [
        ("bad", "steering-vector"),
        ("good", "steering-vector"),
    ]
    with library._database.change() as db:
        db.execute("DELETE FROM entries")
    assert [e.name for e in library.list()] == ["bad", "good"]
    assert library.list()[1].base == BASE
    with pytest.raises(StoreCorrupt, match="'bad@1'"):
        _ = library.list()[0].manifest


def test_a_library_of_version_1_is_brought_up_to_date(tmp_path: Path, vector: Make) -> None:
    new = Library(tmp_path)
    entry = new.save_vector("cheerful", vector())
    new.attest(entry.digest, "verdict", {"passed": True})
    (tmp_path / "store.db").rename(tmp_path / "new.db")
    old = sqlite3.connect(tmp_path / "store.db")
    old.execute("PRAGMA journal_mode = WAL")
    old.executescript(database.SCHEMAS[0] + "PRAGMA user_version = 1;")
    old.execute("ATTACH ? AS new", (str(tmp_path / "new.db"),))
    old.execute("INSERT INTO names SELECT id, name, kind, deleted FROM new.names")
    old.execute("INSERT INTO refs SELECT * FROM new.refs")
    columns = "id, created, action, name, revision, digest, detail"
    old.execute(f"INSERT INTO reflog SELECT {columns} FROM new.reflog")
    columns = "id, digest, kind, object, created"
    old.execute(f"INSERT INTO attestations SELECT {columns} FROM new.attestations")
    old.commit()
    old.close()
    found = Library(tmp_path)
    assert found.get("cheerful") == entry == found.list()[0]
    assert found.disk_use(found.list()[0]) == found.disk_use(entry)
    assert found.passed() == {entry.digest: True}
    found.tag("cheerful", "stable")
    assert [row.undoes for row in found.log()] == [None, None]
