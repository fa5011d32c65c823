"""What entries have to do with each other, as the page and the command line show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vectors.errors import NameNotFound
from vectors.store import Library
from vectors.tasks import Operation, Recipe
from vectors.types import SteeringVector
from workbench.relations import difference_of, lineage_of, parts_of
from workbench.runs.record import RunRecord, RunState, RunView, write_json

BASE = "ba" * 32
FIRST, SECOND = "model.layers.0.up.weight", "model.layers.1.up.weight"


@pytest.fixture
def library(tmp_path: Path) -> Library:
    found = Library(tmp_path / "library")
    for number, block in ((1, 0), (2, 1)):
        v_D = torch.tensor([0.6, 0.8]) if number == 1 else torch.tensor([0.8, -0.6])
        directions = {0: v_D, block: v_D.clone()}
        found.save_vector(
            "kind", SteeringVector(BASE, directions, dict.fromkeys(directions, 2.0), 0)
        )
    base = {FIRST: torch.zeros(4), SECOND: torch.zeros(4), "norm": torch.zeros(4)}
    ones = {FIRST: torch.full((4,), 1.5), SECOND: torch.ones(4), "norm": torch.ones(4)}
    twos = {FIRST: torch.full((4,), 2.0), SECOND: torch.ones(4), "norm": torch.full((4,), 3.0)}
    found.save_task("up", BASE, base, ones, parents=[found.get("kind@1").digest])
    found.save_task("up", BASE, base, twos)
    return found


def test_layers_add_up_from_tensors(library: Library) -> None:
    found = difference_of(library, "up@1", "up@2")
    assert found["names"] == ["up@1", "up@2"] and found["same"] == 1
    layers = {row["layer"]: row for row in found["layers"]}
    assert list(layers) == ["0", "other"]
    assert (layers["0"]["old_norm"], layers["0"]["new_norm"]) == (3.0, 4.0)
    assert (layers["other"]["least"], layers["other"]["most"]) == (4.0, 8.0)
    # Two tensors of one layer: the root of the sum of their squares.
    library.save_task("wide", BASE, {FIRST: torch.zeros(1), FIRST + "2": torch.zeros(1)},
                      {FIRST: torch.tensor([3.0]), FIRST + "2": torch.tensor([4.0])})  # fmt: skip
    library.save_task("none", BASE, {"norm": torch.zeros(1)}, {"norm": torch.ones(1)})
    rows = {row["layer"]: row for row in difference_of(library, "none", "wide")["layers"]}
    assert rows["0"]["tensors"] == 2 and rows["0"]["new_norm"] == pytest.approx(5.0)
    assert rows["0"]["least"] == rows["0"]["most"] == pytest.approx(5.0)


def test_vectors_are_compared_by_block(library: Library) -> None:
    rows = difference_of(library, "kind@1", "kind@2")["blocks"]
    assert [row["block"] for row in rows] == [0, 1]
    assert rows[0]["cosine"] == pytest.approx(0.0, abs=1e-7)
    assert (rows[1]["cosine"], rows[1]["old_norm"], rows[1]["new_norm"]) == (None, None, 2.0)
    assert difference_of(library, "kind", "kind")["blocks"] == []


def test_recipes_are_compared_by_term_and_taken_apart(library: Library) -> None:
    old, new = library.get("up@1").digest, library.get("up@2").digest
    library.save_recipe("r", Recipe(base=BASE, terms=((old, 1.0), (new, 0.5))))
    ties = Operation.of("ties", {"density": 0.3})
    library.save_recipe("r", Recipe(op=ties, base=BASE, terms=((new, -0.25),)))
    found = {row["name"]: row for row in difference_of(library, "r@1", "r@2")["terms"]}
    assert found == {
        "up@1": {"name": "up@1", "old": 1.0, "new": 0.0},
        "up": {"name": "up", "old": 0.5, "new": -0.25},
    }
    parts = parts_of(library, "r")
    assert parts["terms"] == [{"name": "up", "weight": -0.25}] and parts["text"] == "up=-0.25"
    assert (parts["method"], parts["options"]["density"]) == ("ties", 0.3)
    assert parts_of(library, "r@1")["options"] == {}
    library.delete("up")
    assert {t["name"] for t in parts_of(library, "r@1")["terms"]} == {old[:12], new[:12]}
    with pytest.raises(NameNotFound, match="a recipe is needed"):
        parts_of(library, "kind")


def run(folder: Path, kind: str, result: dict[str, Any]) -> RunView:
    folder.mkdir()
    write_json(folder / "result.json", result)
    record = RunRecord(id=folder.name, kind=kind, parameters={}, asked_at=1.0)
    return RunView(record=record, state=RunState(state="done"), folder=folder)


def test_runs_stand_beside_what_they_made_and_measured(library: Library, tmp_path: Path) -> None:
    vector, task = library.get("kind@1"), library.get("up@1")
    made = {"name": "up", "revision": 1, "digest": task.digest}
    runs = [
        run(tmp_path / "train-1", "train", made),
        run(tmp_path / "verify-1", "verify", {"vector": "kind", "digest": vector.digest}),
        run(tmp_path / "verify-2", "verify", {"digest": "cd" * 32}),
        run(tmp_path / "failed", "train", {}),
    ]
    found = lineage_of(library, runs, "up")
    assert [row["id"] for row in found["runs"]] == ["train-1", "verify-1"]
    links = {(k["source"], k["target"], k["how"]) for k in found["links"]}
    assert ("train-1", "up@1", "made by") in links
    assert ("kind@1", "verify-1", "measured by") in links
    assert ("kind@1", "up@1", "made of") in links
