"""Contract: what a run may be asked, and the sentence where it may not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vectors.errors import (
    ContrastSetError,
    DoseError,
    GrammarError,
    InputError,
    ModelMismatch,
    NameNotFound,
    NameTaken,
    WorkbenchError,
)
from vectors.types import SteeringVector
from workbench.runs.parameters import KINDS, checked
from workbench.service import Workbench

BASE, OTHER = "ab" * 32, "cd" * 32
COMMON = {"model": "m", "engine": "vllm"}
EXTRACT = {**COMMON, "contrast": "cheerful", "name": "new"}
VERIFY = {**COMMON, "vector": "kind"}
TRAIN = {**COMMON, "vector": "kind", "name": "new"}
COMPARE = {**COMMON, "vector": "kind", "task": "baked"}
GOOD: dict[str, dict[str, Any]] = {
    "extract": EXTRACT,
    "verify": VERIFY,
    "train": TRAIN,
    "learn": {**COMMON, "contrast": "cheerful", "name": "new"},
    "compare": COMPARE,
    "gradients": COMMON,
    "search": {**COMMON, "recipe": "baked", "behaviours": ["cheerful"]},
    "bisect": {**COMMON, "entries": "baked"},
    "demo": COMMON,
}


@pytest.fixture(scope="module")
def workbench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """A library with a vector and a task vector of one base, and a vector of another."""
    made = Workbench(tmp_path_factory.mktemp("home"))
    for name, base in (("kind", BASE), ("foreign", OTHER)):
        vector = SteeringVector(base, {1: torch.eye(4)[0]}, {1: 3.0}, 1)
        made.library.save_vector(name, vector)
    made.library.save_task("baked", BASE, {"w": torch.zeros(4)}, {"w": torch.ones(4)})
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_filled_in_and_plain(kind: str, workbench: Workbench) -> None:
    found = checked(kind, GOOD[kind], workbench)
    assert set(found) == set(KINDS[kind].model_fields)
    assert json.loads(json.dumps(found)) == found
    assert checked(kind, found, workbench) == found


def test_the_defaults_of_training(workbench: Workbench) -> None:
    found = checked("train", TRAIN, workbench)
    assert (found["optimizer"], found["targets"], found["tier"]) == ("apollo", "soft", "auto")
    assert (found["replay"], found["learning_rate"], found["prompts"]) == (0.25, 1e-4, 150)
    assert (found["passes"], found["tokens"], found["rank"], found["batch"]) == (1, 48, 256, 6)
    assert found["dose"] is None and found["random_direction"] is False


WRONG = [
    ("frob", COMMON, InputError, "no kind of run called 'frob'"),
    ("verify", {**VERIFY, "frob": 1}, InputError, "'frob' is not a parameter of verify"),
    ("verify", COMMON, InputError, "needs 'vector'"),
    ("verify", {**VERIFY, "controls": 0}, InputError, "'controls'"),
    ("verify", {**VERIFY, "controls": 200}, InputError, "'controls'"),
    ("verify", {**VERIFY, "controls": "many"}, InputError, "'controls'"),
    ("verify", {**VERIFY, "doses": []}, InputError, "'doses'"),
    ("verify", {**VERIFY, "doses": [0.0]}, DoseError, "not 0"),
    ("verify", {**VERIFY, "doses": [0.1, float("nan")]}, InputError, "'doses'"),
    ("verify", {**VERIFY, "doses": [0.1, 11]}, DoseError, "stay within 10"),
    ("verify", {**VERIFY, "vector": "nothing"}, NameNotFound, "'nothing'"),
    ("verify", {**VERIFY, "vector": "baked"}, NameNotFound, "task-vector"),
    ("verify", {**VERIFY, "vector": "!"}, GrammarError, "not valid"),
    ("verify", {**VERIFY, "engine": "frob"}, InputError, "no engine 'frob'"),
    ("verify", {**VERIFY, "model": ""}, InputError, "'model'"),
    ("extract", {**EXTRACT, "name": "Bad Name"}, GrammarError, "'Bad Name'"),
    ("extract", {**EXTRACT, "name": "baked"}, NameTaken, "task-vector already"),
    ("extract", {**EXTRACT, "contrast": "nothing"}, NameNotFound, "'nothing'"),
    ("extract", {**EXTRACT, "method": "magic"}, InputError, "'method'"),
    ("extract", {**EXTRACT, "position": "first"}, InputError, "'position'"),
    ("train", {**TRAIN, "name": "kind"}, NameTaken, "steering-vector already"),
    ("train", {**TRAIN, "dose": 0}, DoseError, "steers nothing"),
    ("train", {**TRAIN, "dose": float("inf")}, InputError, "'dose'"),
    ("train", {**TRAIN, "learning_rate": 0}, InputError, "'learning_rate'"),
    ("train", {**TRAIN, "learning_rate": 0.2}, InputError, "'learning_rate'"),
    ("train", {**TRAIN, "replay": 0.95}, InputError, "'replay'"),
    ("train", {**TRAIN, "name": "deadbeef" * 8}, GrammarError, "looks like a digest"),
    ("train", {**TRAIN, "prompts": 7}, InputError, "'prompts'"),
    ("train", {**TRAIN, "passes": 21}, InputError, "'passes'"),
    ("train", {**TRAIN, "tokens": 3}, InputError, "'tokens'"),
    ("train", {**TRAIN, "tier": 1, "reuse": "host"}, InputError, "set tier 2"),
    ("train", {**TRAIN, "tier": 3, "recorded": True}, InputError, "Steps are recorded"),
    ("train", {**TRAIN, "tier": 4}, InputError, "'tier'"),
    ("train", {**TRAIN, "optimizer": "adam"}, InputError, "'optimizer'"),
    ("train", {**TRAIN, "seed": -1}, InputError, "'seed'"),
    ("compare", {**COMPARE, "task": "kind"}, NameNotFound, "task-vector or recipe"),
    ("compare", {**COMPARE, "vector": "foreign"}, ModelMismatch, "different bases"),
    ("compare", {**COMPARE, "prompts": []}, InputError, "'prompts'"),
    ("compare", {**COMPARE, "prompts": [""]}, InputError, "'prompts'"),
    ("compare", {**COMPARE, "temperature": 3}, InputError, "'temperature'"),
    ("demo", {**COMMON, "prefix": "A"}, GrammarError, "'A'"),
]


@pytest.mark.parametrize(("kind", "parameters", "error", "words"), WRONG)
def test_what_is_wrong_is_one_sentence_now(
    kind: str,
    parameters: dict[str, Any],
    error: type[WorkbenchError],
    words: str,
    workbench: Workbench,
) -> None:
    with pytest.raises(InputError) as told:
        checked(kind, parameters, workbench)
    assert type(told.value) is error
    assert words in str(told.value)
    assert "\n" not in str(told.value) and str(told.value).endswith(".")


def test_the_same_sweep_is_the_same_parameters(workbench: Workbench) -> None:
    one = checked("verify", {**VERIFY, "doses": [0.2, -0.1, 0.2]}, workbench)
    other = checked("verify", {**VERIFY, "doses": (-0.1, 0.2)}, workbench)
    assert one == other and one["doses"] == [-0.1, 0.2]


def test_a_file_is_remembered_by_its_whole_path(
    workbench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"P{n}", "positive": "yes", "negative": f"no {n}"} for n in range(9)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    found = checked("extract", {**EXTRACT, "contrast": "own.jsonl"}, workbench)
    assert found["contrast"] == str((tmp_path / "own.jsonl").resolve())
    (tmp_path / "bad.jsonl").write_text("nonsense")
    with pytest.raises(ContrastSetError, match="line 1"):
        checked("extract", {**EXTRACT, "contrast": "bad.jsonl"}, workbench)


def test_another_model_than_the_vectors_is_refused(
    workbench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Here:
        base = OTHER

    monkeypatch.setattr(workbench, "model", lambda: Here)
    monkeypatch.setattr(workbench, "models", lambda: [{"name": "m", "ready": True}])
    monkeypatch.setattr(workbench, "model_name", "m")
    with pytest.raises(ModelMismatch, match="choose the model"):
        checked("verify", VERIFY, workbench)
    monkeypatch.setattr(workbench, "models", lambda: [{"name": "m", "ready": False}])
    assert checked("verify", VERIFY, workbench)["vector"] == "kind"
