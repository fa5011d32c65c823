"""The runs of the loop, on the tiny model, through real processes and a real engine."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time

import pytest
import torch

from vectors.errors import Cancelled, ContrastSetError, InputError, NameTaken, NotSteerable
from vectors.steering.statistics import permutation_p
from workbench.runs import work
from workbench.train.lesson_file import load_lesson
from workbench.verify.verify import Dose, _rules

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
SMALL = {"prompts": 12, "tokens": 8, "batch": 4, "read_pairs": False}


@pytest.fixture(scope="module")
def extracted(tiny_workbench):
    tiny_workbench.engine()
    result = tiny_workbench.extract("cheerful", name="loop")
    return tiny_workbench, result


def test_extract_keeps_a_vector_with_its_set(extracted):
    workbench, result = extracted
    entry, vector = workbench.library.load_vector("loop")
    assert result["digest"] == entry.digest and vector.best_block == result["best_block"]
    assert len(result["blocks"]) == 4 and set(vector.directions) == {0, 1, 2, 3}
    assert b'"prompt"' in workbench.library.read_file(entry, "contrast.jsonl")


def test_the_same_extraction_gives_the_same_digest(extracted):
    workbench, result = extracted
    again = workbench.extract("cheerful", name="loop-again")
    assert again["digest"] == result["digest"]


@pytest.mark.parametrize("method", ["pca", "logistic"])
def test_other_methods_and_positions(extracted, method):
    workbench, _ = extracted
    result = workbench.extract("formal", name=f"by-{method}", method=method, position="last")
    assert 0 <= result["best_block"] < 4


@pytest.mark.parametrize("position", ["completion-mean", "last"])
def test_the_engine_reads_what_the_model_in_this_process_does(extracted, position):
    workbench, _ = extracted
    here, there = (
        workbench.extract("brief", name=f"by-{reader}", reader=reader, position=position)
        for reader in ("model", "engine")
    )
    assert here["best_block"] == there["best_block"]
    ours, theirs = (workbench.library.load_vector(f"by-{r}")[1] for r in ("engine", "model"))
    for block in range(4):
        cosine = torch.cosine_similarity(ours.directions[block], theirs.directions[block], dim=0)
        assert cosine > 0.999, block
        assert ours.mean_norms[block] == pytest.approx(theirs.mean_norms[block], rel=1e-2)


def test_verify_train_compare_through_the_engine(extracted):
    workbench, _ = extracted
    verdict = workbench.verify("loop", doses=[0.3], controls=2)
    assert not verdict["passed"], "two controls can never be enough"
    assert verdict["random"][0]["change"] != verdict["random"][1]["change"]
    assert workbench.verdict("loop")["base_margin"] == verdict["base_margin"]
    seen = []
    trained = workbench.train(
        name="loop-baked", vector="loop", dose=0.3, watch=lambda view: seen.append(view), **SMALL
    )
    assert trained["changed_share"] > 0 and trained["decisions"] >= 9
    assert [e for e in seen[-1].events() if e["kind"] == "step"]
    margin = trained["margin"]
    recovered = (margin["trained"] - margin["base"]) / (margin["steered"] - margin["base"])
    assert trained["recovered"] == pytest.approx(recovered)
    compared = workbench.compare(
        vector="loop", task="loop-baked", dose=0.3, prompts=["hello", "you?"]
    )
    assert [row["prompt"] for row in compared["rows"]] == ["hello", "you?"]
    assert compared["weights"]["trained"] == workbench.weights("loop-baked=1")
    assert compared["margin"] == pytest.approx(margin, abs=1e-2)
    entry = workbench.library.get("loop-baked")
    assert entry.info["vector"] == workbench.library.get("loop").digest
    assert entry.info["dose"] == 0.3 and "torch" in entry.info["versions"]


def test_a_training_killed_on_the_way_goes_on_with_its_own_decisions(extracted):
    workbench, _ = extracted
    long = {**SMALL, "prompts": 40, "passes": 20}
    view = workbench.start("train", name="loop-killed", vector="loop", dose=0.3, **long)
    lesson = view.folder / "loop-killed.lesson.safetensors"
    checkpoint = view.folder / "loop-killed.checkpoint.safetensors"
    while not checkpoint.exists():
        assert not workbench.runs.get(view.id).ended, "it ended before it could be killed"
        time.sleep(0.01)
    os.kill(int(workbench.runs.get(view.id).state.process.split(":")[0]), signal.SIGKILL)
    while not workbench.runs.get(view.id).ended:
        time.sleep(0.01)  # a busy machine takes its time to end a process
    written = load_lesson(lesson)["learnt"].decisions
    workbench.runs.resume(view.id)
    trained = workbench.runs.follow(view.id).result()
    assert "decisions" not in trained["times"], "they were written again"
    kept = json.loads(
        workbench.library.read_file(workbench.library.get("loop-killed"), "decisions.json")
    )
    assert kept == [[list(d.context_ids), list(d.decision_ids), d.kind] for d in written]
    assert trained["changed_share"] > 0
    assert not lesson.exists() and not checkpoint.exists()


@pytest.mark.parametrize("reader", ["model", "engine"])
def test_instructions_become_completions(extracted, tmp_path, reader):
    workbench, _ = extracted
    rows = [
        {
            "prompt": f"Say {word}",
            "positive_instruction": f"Be glad, {word}.",
            "negative_instruction": f"Be sad, {word}!",
        }
        for word in ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    ]
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        result = workbench.extract(str(path), name="asked", reader=reader)
    except NotSteerable as error:
        assert "the same on both sides" in str(error)
    else:
        entry = workbench.library.get("asked")
        assert b'"positive"' in workbench.library.read_file(entry, "contrast.jsonl")
        asking = work.instruction_for(work.vector_of(workbench, "asked")[2], entry)
        assert asking == "Be glad, one.", "verification compares with the person's own words"
        assert result["contrast"]["train"] >= 4


def test_a_run_is_cancelled_and_says_so(extracted):
    workbench, _ = extracted
    view = workbench.start("verify", vector="loop")
    workbench.runs.cancel(view.id)
    with pytest.raises(Cancelled):
        workbench.runs.follow(view.id)
    assert workbench.runs.get(view.id).state.state == "cancelled"


def test_bad_input_is_told_before_a_run_begins(extracted, tmp_path):
    workbench, _ = extracted
    before = len(workbench.runs.list())
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x", "positive": "y"}\n')
    with pytest.raises(ContrastSetError, match="line 1"):
        workbench.extract(str(bad), name="bad")
    with pytest.raises(InputError):
        workbench.extract("cheerful", name="Bad Name")
    with pytest.raises(InputError):
        workbench.verify("loop", doses=[float("nan")])
    with pytest.raises(NameTaken):
        workbench.train(name="loop", vector="loop")
    assert len(workbench.runs.list()) == before


def test_a_verdict_on_the_opposite_gives_no_dose_to_work_with(extracted):
    workbench, _ = extracted
    vector = workbench.library.load_vector("loop")[1]
    entry = workbench.library.save_vector("doses", dataclasses.replace(vector, info={"n": 1}))
    assert work.working_dose(workbench, entry) == 0.2
    for dose, wanted in ((0.3, 0.3), (-0.1, 0.3), (0.0, 0.3), (0.25, 0.25)):
        workbench.library.attest(entry.digest, "verdict", {"working_dose": dose})
        assert work.working_dose(workbench, entry) == wanted


@pytest.mark.parametrize(("better", "controls", "passed"), [(0, 19, True), (1, 39, False)])
def test_a_verdict_passes_only_where_all_random_directions_are_beaten(better, controls, passed):
    p = permutation_p(1.0, [2.0] * better + [0.0] * (controls - better))
    assert p <= 0.05
    dose = Dose(0.2, 1, 0.5, 1.5, 1, 0.5, 1.5, 0.01, 0.02, 0.0, "")
    rules = {rule.rule: rule for rule in _rules(dose, -1.0, p, controls, 0.1)}
    assert rules["random"].passed is passed
    assert ("Not all of them are beaten" in rules["random"].words) is not passed
