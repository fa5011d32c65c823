"""`workbench library`: tags, pins, reverts, differences, gc, fsck, push and pull."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vectors.types import SteeringVector
from workbench.service import Workbench


@pytest.fixture(autouse=True)
def kept(home: Path) -> Any:
    """A library with two revisions of one vector."""
    library = Workbench(home).library
    for number in (1, 2):
        v_D = torch.tensor([0.6, 0.8])
        library.save_vector("kind", SteeringVector("ab" * 32, {0: v_D}, {0: 1.0}, 0, {"n": number}))
    return library


def test_tag_pin_revert_diff(workbench: Any, kept: Any) -> None:
    assert workbench("library", "tag", "kind@1", "first", "--json").json["tag"] == "first"
    assert workbench("library", "show", "kind@first", "--json").json["tags"] == {"first": 1}
    assert "first (1)" in workbench("library", "show", "kind").out
    assert workbench("library", "pin", "kind@1", "--reason", "the paper's").code == 0
    assert "the paper's" in workbench("library", "pins").out
    assert workbench("library", "unpin", "kind@1").code == 0
    assert "n: 1 -> 2" in workbench("library", "diff", "kind@1").out
    assert workbench("library", "diff", "kind@1", "kind@2", "--json").json["info"] == {"n": [1, 2]}
    assert workbench("library", "revert", "kind", "--json").json["revision"] == 3
    assert "bit for bit" in workbench("library", "diff", "kind@1", "kind").out
    assert workbench("library", "untag", "kind", "first").code == 0


def test_undo_walks_back(workbench: Any, kept: Any) -> None:
    assert workbench("library", "rename", "kind", "warm").code == 0
    assert "Took back: rename kind (to warm)" in workbench("library", "undo").out
    assert workbench("library", "undo", "--json").json["undone"]["action"] == "save"
    assert "bit for bit" in workbench("library", "diff", "kind@1", "kind").out
    assert workbench("library", "undo").code == 0
    assert workbench("library", "list", "--json").json["entries"] == []
    told = workbench("library", "undo", "--json")
    assert told.code == 2 and "Nothing is left to undo" in told.json["error"]["message"]


def test_lineage_and_blocks(workbench: Any, kept: Any) -> None:
    found = workbench("library", "lineage", "kind@1", "--json").json
    assert [place["key"] for place in found["places"]] == ["kind@1", "kind@2"]
    assert [link["how"] for link in found["links"]] == ["next revision"]
    assert "kind@2" in workbench("library", "lineage", "kind").out
    (block,) = workbench("library", "diff", "kind@1", "kind@2", "--json").json["blocks"]
    assert block == {"block": 0, "cosine": pytest.approx(1), "old_norm": 1.0, "new_norm": 1.0}
    assert "cosine" in workbench("library", "diff", "kind@1").out


def test_sign_and_verify(workbench: Any, kept: Any, home: Path) -> None:
    kept.attest(kept.get("kind").digest, "verdict", {"passed": True, "working_dose": 0.2})
    assert workbench("library", "verify-signature", "kind", "--json").json["error"]["kind"] == (
        "SignatureInvalid"
    )
    told = workbench("library", "sign", "kind", "--json").json
    assert [row["kind"] for row in told["signed"]] == ["verdict"] and len(told["key"]) == 64
    assert "signed already" in workbench("library", "sign", "kind").out
    proved = workbench("library", "verify-signature", "kind", "--key", told["key"], "--json").json
    assert [row["key"] for row in proved["verified"]] == [told["key"]]
    (shown,) = workbench("library", "show", "kind", "--json").json["signatures"]
    assert (shown["own"], shown["holds"]) == (True, True)
    wrong = workbench("library", "verify-signature", "kind", "--key", "ab" * 32)
    assert wrong.code == 1 and wrong.err.count("\n") == 1 and "abababab" in wrong.err
    for lost in (["--key", str(home / "nobody.pub")], ["--key", "me"]):
        told = workbench("library", "verify-signature", "kind", *lost)
        assert told.code == 2 and told.err.count("\n") == 1 and told.err.endswith(".\n")


def test_gc_and_fsck(workbench: Any, kept: Any) -> None:
    dry = workbench("library", "gc", "--dry-run", "--json").json
    assert (dry["dry_run"], dry["bytes"]) == (True, 0)
    assert "Removed 0 entries" in workbench("library", "gc").out
    assert "Nothing is wrong." in workbench("library", "fsck").out
    (stored,) = kept.get("kind").manifest.objects()
    kept.objects.path(stored).unlink()
    told = workbench("library", "fsck", "--json")
    assert (told.code, told.json["clean"], told.json["faults"][0]["kind"]) == (1, False, "missing")
    assert "save its entry again" in workbench("library", "fsck").out


def test_push_and_pull(workbench: Any, tmp_path: Path) -> None:
    pytest.importorskip("obstore", reason="push and pull need obstore")
    copy, other = str(tmp_path / "copy"), str(tmp_path / "other")
    assert workbench("library", "push", copy, "--json").json["names"] == {"kind": "new"}
    assert "1 names were up to date" in workbench("library", "push", copy).out
    told = workbench("library", "pull", copy, "kind", "--as", "gentle", "--home", other, "--json")
    assert told.json["names"] == {"gentle": "new"}
    rows = workbench("library", "list", "--home", other, "--json").json["entries"]
    assert [(row["name"], row["revision"]) for row in rows] == [("gentle", 2)]


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["tag", "kind", "deadbeef"], "GrammarError"),
        (["untag", "kind", "none"], "NameNotFound"),
        (["unpin", "kind"], "NameNotFound"),
        (["revert", "kind@2"], "InputError"),
        (["diff", "kind", "nothing"], "NameNotFound"),
        (["lineage", "nothing"], "NameNotFound"),
        (["gc", "--grace", "-1"], "InputError"),
        (["push", "ftp://host/x"], "InputError"),
        (["pull", "/nowhere-to-be-found"], "InputError"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_errors_are_one_sentence(workbench: Any, arguments: list[str], kind: str) -> None:
    told = workbench("library", *arguments)
    assert told.code == 2 and told.err.count("\n") == 1 and told.err.endswith(".\n"), told.err
    assert workbench("library", *arguments, "--json").json["error"]["kind"] == kind
