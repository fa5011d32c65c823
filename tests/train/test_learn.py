"""A person's own data becomes a task vector: chat file, stripped instructions, one side of a set.

Everything is the real part, with transformers as the engine.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import pytest
import torch

from vectors.errors import EngineFailed, InputError, NameNotFound, NameTaken, PromptTooLong
from vectors.steering.controls import random_direction
from vectors.types import SteeringVector
from workbench.data.chat import parse_chats
from workbench.data.templates import context_ids
from workbench.models.loading import load_tokenizer
from workbench.runs.learn import learn_run
from workbench.runs.parameters import checked
from workbench.runs.process import Progress
from workbench.service import Workbench
from workbench.train.answers import Desk
from workbench.train.bake import _check_measurable
from workbench.train.batches import Decision
from workbench.train.config import TrainConfig
from workbench.train.data_sources import _held_out
from workbench.train.examples import Example
from workbench.train.losses import SoftTargets, soft_loss, token_loss
from workbench.train.sources import VectorSource, set_aside

SMALL = {"tokens": 6, "batch": 4, "prompts": 8, "learning_rate": 2e-3, "passes": 4}


@pytest.fixture(scope="module")
def wb(tiny_home):
    with Workbench(tiny_home, "tiny", "transformers") as found:
        yield found


def learn(wb: Workbench, folder: Any, **options: Any) -> tuple[dict[str, Any], list[dict]]:
    asked = {"model": "tiny", "engine": "transformers", **SMALL, **options}
    folder.mkdir(exist_ok=True)
    result = learn_run(wb, checked("learn", asked, wb), Progress(folder))
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return result, events


def chats(folder: Any, count: int = 10, name: str = "chat.jsonl", **extra: Any) -> str:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"Say the word {i}."},
                {"role": "assistant", "content": f"Word {i}, with joy!"},
            ]
        }
        for i in range(count)
    ]
    path = folder / name
    path.write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines, *([extra] if extra else [])])
    )
    return str(path)


def test_certain_targets_are_the_cross_entropy_of_their_tokens():
    torch.manual_seed(0)
    logits = torch.randn(9, 50, requires_grad=True)
    labels = torch.randint(0, 50, (9,))
    for k in (1, 7, 50, 64):
        certain = SoftTargets.certain(labels, k, 50)
        assert torch.allclose(soft_loss(logits, certain), token_loss(logits, labels), atol=1e-6)
        (grad,) = torch.autograd.grad(soft_loss(logits, certain), logits)
        (expected,) = torch.autograd.grad(token_loss(logits, labels), logits)
        assert torch.allclose(grad, expected, atol=1e-7)


def test_a_chat_file_is_learnt_and_measured(wb, tmp_path):
    result, events = learn(wb, tmp_path / "run", name="words", data=chats(tmp_path))
    assert result["source"] == "chat" and (result["decisions"], result["replay"]) == (8, 8 - 1)
    assert result["log_prob"]["trained"] > result["log_prob"]["base"] + 0.1
    assert result["recovered"] is None and result["margin"] == {}
    before, after = result["held_out_loss"]
    assert after["steered"] < before["steered"]
    # The held-out loss of certain targets is what the engine measures, with the other sign.
    assert before["steered"] == pytest.approx(-result["log_prob"]["base"], abs=0.02)
    assert before["general"] is not None and result["kl"]["trained"] > 0
    entry = wb.library.get("words")
    assert entry.info["source"] == "chat" and entry.info["file_digest"]
    assert {e["kind"] for e in events} >= {"step"}
    assert not list((tmp_path / "run").glob("words.*")), "what was kept for resuming is dropped"


def test_without_replay_nothing_general_is_learnt_and_yet_forgetting_is_measured(wb, tmp_path):
    result, _ = learn(wb, tmp_path / "run", name="bare", data=chats(tmp_path, 3), replay=0)
    assert (result["decisions"], result["replay"]) == (3, 0) and result["log_prob"] == {}
    before, after = result["held_out_loss"]
    assert before["steered"] is None and after["steered"] is None
    assert after["general"] > before["general"] > 0


def test_the_last_weights_are_kept_beside_better_ones(wb, tmp_path):
    options = {"passes": 8, "learning_rate": 2e-2, "held_out_every": 1, "replay": 0}
    result, events = learn(wb, tmp_path / "run", name="overdone", data=chats(tmp_path), **options)
    losses = [event["loss"] for event in events if event["kind"] == "held_out"]
    assert result["steps"]["kept_step"] < result["steps"]["steps"], "nothing to choose between"
    assert result["last"] == "overdone-last@1"
    best, last = wb.library.get("overdone"), wb.library.get("overdone-last")
    assert best.digest != last.digest
    assert best.info["kept_step"] == result["steps"]["kept_step"]
    assert last.info["kept_step"] == last.info["steps"] == result["steps"]["steps"]
    assert min(losses) == losses[best.info["kept_step"] - 1]


def test_only_what_is_asked_for_is_kept(wb, tmp_path):
    options = {"passes": 8, "learning_rate": 2e-2, "held_out_every": 1, "replay": 0}
    options["keep"] = "best"
    result, _ = learn(wb, tmp_path / "run", name="alone", data=chats(tmp_path), **options)
    assert result["last"] is None and result["steps"]["kept_step"] < result["steps"]["steps"]
    with pytest.raises(NameNotFound):
        wb.library.get("alone-last")


def test_replay_comes_from_a_file(wb, tmp_path):
    mine = chats(tmp_path, 4, "mine.jsonl", prompt="What is a tree?")
    asked = {"data": chats(tmp_path), "replay_file": mine}
    result, _ = learn(wb, tmp_path / "run", name="mine", **asked)
    # 10 decisions at a share of a quarter ask for at least 8, and the file has 4 and a prompt.
    assert (result["decisions"], result["replay"]) == (8, 4)
    kept = json.loads(wb.library.read_file(wb.library.get("mine"), "decisions.json"))
    assert sum(kind == "replay" for _, _, kind in kept) == 4
    assert wb.library.get("mine").info["replay_digest"]


def test_a_replay_prompt_that_leaves_no_room_is_told_by_its_line(wb, tmp_path):
    mine = chats(tmp_path, 2, "mine.jsonl", prompt="word " * 5000)
    asked = {"data": chats(tmp_path), "replay_file": mine}
    with pytest.raises(PromptTooLong, match="replay prompt of line 3 has "):
        learn(wb, tmp_path / "run", name="mine-long", **asked)


def test_instructions_are_stripped(wb, tmp_path):
    path = tmp_path / "style.txt"
    path.write_text("Always answer with joy and with the word sunshine.")
    result, events = learn(wb, tmp_path / "run", name="joy", instructions=str(path), passes=8)
    shown = next(e for e in events if e["kind"] == "stripped")
    assert "sunshine" in shown["with_instructions"] and "sunshine" not in shown["stripped"]
    assert shown["left"] < shown["tokens"]
    entry = wb.library.get("joy")
    kept = json.loads(wb.library.read_file(entry, "stripped.json"))
    assert kept["instructions"].startswith("Always") and kept["stripped"] == shown["stripped"]
    rows = json.loads(wb.library.read_file(entry, "decisions.json"))
    tokenizer_rows = [context for context, _, kind in rows if kind == "steered"]
    assert max(map(len, tokenizer_rows)) < shown["tokens"], "the student sees no instructions"
    log_prob = result["log_prob"]
    assert set(log_prob) == {"base", "instructed", "trained"}
    share = (log_prob["trained"] - log_prob["base"]) / (log_prob["instructed"] - log_prob["base"])
    assert result["recovered"] == pytest.approx(share)
    before, after = result["held_out_loss"]
    assert after["steered"] < before["steered"]


def test_one_side_of_a_set_is_preferred(wb, tmp_path):
    few = tmp_path / "few.jsonl"
    cheerful = files("workbench.data").joinpath("builtin/cheerful.jsonl").read_text("utf-8")
    few.write_text("\n".join(cheerful.splitlines()[:32]))
    split = wb.contrast.get(str(few))
    tokenizer = load_tokenizer(wb.model())
    for side in ("positive", "negative"):
        options = {"contrast": str(few), "side": side, "replay": 0}
        result, _ = learn(wb, tmp_path / side, name=f"prefer-{side}", **options)
        before, after = result["held_out_loss"]
        assert after["steered"] < before["steered"]
        assert set(result["margin"]) == {"base", "trained"}
        entry = wb.library.get(f"prefer-{side}")
        assert entry.info["side"] == side and entry.info["contrast"]["digest"] == split.digest
        rows = json.loads(wb.library.read_file(entry, "decisions.json"))
        said = [tokenizer.decode(ids) for _, ids, _ in rows]
        assert said == [f"{getattr(pair, side)}<|end|>" for pair in split.train]


def test_a_set_of_instructions_is_stripped_on_its_side(wb, tmp_path):
    rows = [
        {
            "prompt": f"Say {i}",
            "positive_instruction": f"Be glad, {i}.",
            "negative_instruction": f"Be sad, {i}!",
        }
        for i in range(12)
    ]
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"contrast": str(path), "side": "negative", "passes": 1, "replay": 0}
    result, events = learn(wb, tmp_path / "run", name="sad", **options)
    assert next(e for e in events if e["kind"] == "stripped")["instructions"].startswith("Be sad")
    assert result["source"] == "instructions" and "instructed" in result["log_prob"]


def test_what_cannot_be_learnt_is_refused_by_line(wb, tmp_path):
    long = {
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "word " * 3000},
        ]
    }
    with pytest.raises(PromptTooLong, match="decision of line 11 "):
        learn(wb, tmp_path / "run", name="long", data=chats(tmp_path, **long))


def test_what_the_engine_could_not_measure_is_refused_before_training(wb, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_WINDOW", "256")
    turns = [{"role": "user", "content": "x " * 260}, {"role": "assistant", "content": "Yes."}]
    rows = [
        {"messages": [{**turns[0], "content": f"{i} {turns[0]['content']}"}, turns[1]]}
        for i in range(8)
    ]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        PromptTooLong, match=r"held-out decision of line \d .* WORKBENCH_WINDOW to \d+"
    ):
        learn(wb, tmp_path / "run", name="long", data=str(path))
    rows = [
        {"prompt": f"Why {i}?", "instructions": "Be brief. " * (1 + 200 * (i == 2))}
        for i in range(5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(PromptTooLong, match="prompt of line 3 with its instructions"):
        learn(wb, tmp_path / "run", name="long", instructions=str(path))


def test_a_side_that_is_only_measured_must_fit_as_well(wb, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_WINDOW", "256")
    rows = [
        {"prompt": f"Say {i}", "positive": "Yes.", "negative": "no " * (300 if i % 2 else 1)}
        for i in range(12)
    ]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"contrast": str(path), "side": "positive", "replay": 0}
    with pytest.raises(PromptTooLong, match="one of them free"):
        learn(wb, tmp_path / "run", name="long-side", **options)
    assert not list((tmp_path / "run").glob("long-side.*")), "it was found before training"


def test_what_fills_the_window_cannot_be_measured():
    said = Example(Decision((1,) * 200, (2,) * 56, "steered", 3), "itself")
    _check_measurable([said], 257)
    with pytest.raises(PromptTooLong, match=r"line 3 has 256 tokens.* to 257 or more"):
        _check_measurable([said], 256)


@pytest.mark.parametrize("name", ["taken", "x" * 95 + "-last"])
def test_the_last_weights_become_no_revision_of_something_else(wb, tmp_path, name):
    wb.library.save_task("taken-last", wb.model().base, {"w": torch.zeros(2)}, {"w": torch.ones(2)})
    asked = {"model": "tiny", "engine": "transformers", "data": chats(tmp_path), "name": name}
    with pytest.raises(NameTaken, match="-last', which is something else already"):
        checked("learn", asked, wb)
    assert checked("learn", {**asked, "keep": "best"}, wb)["keep"] == "best"


def test_a_run_that_fails_at_its_measurement_goes_on_there(wb, tmp_path, monkeypatch):
    def fails(*args: Any) -> None:
        raise EngineFailed("The engine is gone.")

    asked = {"name": "again", "data": chats(tmp_path)}
    with monkeypatch.context() as patch, pytest.raises(EngineFailed):
        patch.setattr("workbench.runs.learn.measure_learnt", fails)
        learn(wb, tmp_path / "run", **asked)
    first = wb.library.get("again").digest
    assert (tmp_path / "run" / "again.lesson.safetensors").exists()
    result, events = learn(wb, tmp_path / "run", **asked)
    assert "decisions" not in result["times"], "they were written again"
    steps = [event["step"] for event in events if event["kind"] == "step"]
    assert steps == sorted(set(steps)), "it trained again what it had saved"
    assert result["digest"] == first
    assert not list((tmp_path / "run").glob("again.*"))


def test_a_held_out_prompt_is_not_learnt():
    rows = [Example(Decision((1, n % 7), (2, n), "steered", n)) for n in range(30)]
    learnt, held_out = set_aside(rows)
    assert {e.decision.context_ids for e in held_out} == {(1, 0)} and len(held_out) == 5
    assert {e.decision.context_ids for e in learnt} == {(1, n) for n in range(1, 7)}
    assert len(learnt) + len(held_out) == len(rows)
    one = [Example(Decision((1,), (2, n), "steered", n)) for n in range(9)]
    assert set_aside(one) == (one, []), "something must be left to learn"


WRONG = [
    ({}, "0 were given"),
    ({"data": "CHAT", "contrast": "brief"}, "2 were given"),
    ({"data": "nothing.jsonl"}, "cannot be read"),
    ({"instructions": "EMPTY"}, "is empty"),
    ({"data": "CHAT", "side": "left"}, "'side'"),
    ({"data": "CHAT", "replay_file": "EMPTY"}, "is empty"),
]


@pytest.mark.parametrize(("given", "words"), WRONG)
def test_wrong_data_is_told_before_a_run_begins(wb, tmp_path, given, words):
    (tmp_path / "empty.txt").write_text("")
    files = {"CHAT": chats(tmp_path), "EMPTY": str(tmp_path / "empty.txt")}
    asked = {key: files.get(value, value) for key, value in given.items()}
    with pytest.raises(InputError, match=words):
        checked("learn", {"model": "tiny", "name": "x", **asked}, wb)


@pytest.mark.parametrize(
    ("lines", "held"),
    [
        ([f"prompt {n}" for n in range(10)], 2),
        ([f"prompt {n % 25}" for n in range(100)], 20),
        ([f"prompt {n}" for n in range(4)], 0),
        ([f"prompt {n}" for n in range(400)], 48),
    ],
)
def test_conversations_that_begin_alike_are_learnt_or_held_out_together(tmp_path, lines, held):
    rows = [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": f"r{n}"}]}
        for n, p in enumerate(lines)
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = parse_chats(path)
    numbers = _held_out(file)
    assert len(numbers) == held
    asked = {n: chat.messages[0].content for n, chat in file.lines.items()}
    assert not {asked[n] for n in numbers} & {asked[n] for n in asked.keys() - numbers}


@pytest.mark.parametrize(("different", "held"), [(20, 4), (2, 0)])
def test_where_all_conversations_begin_alike_the_equal_stay_together(tmp_path, different, held):
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"r{n}"}]}
        for n in list(range(different)) * (20 // different)
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(_held_out(parse_chats(path))) == held


def test_of_held_out_prompts_the_sides_are_not_learnt_either(wb, tmp_path):
    contrast = wb.contrast.get("cheerful")
    model = wb.model()
    directions = {b: random_direction(model.width, b) for b in range(model.blocks)}
    vector = SteeringVector(model.base, directions, dict.fromkeys(directions, 1.0), 1)
    digest = wb.library.put_vector(vector)
    config = TrainConfig(seed=1)
    desk = Desk(wb.engine, model, load_tokenizer(model), config, prompts=60, tokens=4)
    tmp_path.joinpath("run").mkdir()
    source = VectorSource(vector, digest, 0.0, contrast.train)
    found = source.write(desk, Progress(tmp_path / "run"))
    held = {example.decision.context_ids for example in found.held_out}
    learnt = {example.decision.context_ids for example in found.learnt}
    assert len(held) >= 5 and not held & learnt
    sides = {
        context_ids(desk.tokenizer, ({"role": "user", "content": p.prompt},))
        for p in contrast.train
    }
    assert held & sides, "no held-out prompt is one of the set's"
    assert len(sides - held) > 30 and sides - held <= learnt
