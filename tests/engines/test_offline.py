"""vLLM's own `LLM` class with the plugin, where blocks, rows and tokens a step are few."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tests_support.offline import environment

from vectors.steering.controls import random_direction
from vectors.types import SteeringVector
from workbench.engines.transformers import TransformersEngine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

IDS = torch.randint(4, 260, (200,), generator=torch.Generator().manual_seed(3)).tolist()
SHORT = IDS[:20]
STEERS = [f"axis={dose}:{block}" for dose in (2.0, -2.0) for block in range(4)]
LATE = '{"terms": [{"name": "axis", "dose": 0.8, "blocks": [0, 2]}], "start": 50}'
SCORED = ["axis=0.5:0-3/prompt", "axis=1!ablate", LATE]


def ask(ids=SHORT, steer="", tokens=60, **more):
    return {"ids": ids, "steer": steer, "tokens": tokens, **more}


CONDITION = (
    '{"terms": [{"name": "axis", "dose": 2.0, "blocks": [0], "phase": "decode"}], "condition": %s}'
)
NEVER = CONDITION % '{"name": "axis", "above": 1}'
EVER = CONDITION % '{"name": "axis", "block": 3, "above": -1}'
SEEN = [ask(IDS, "axis=2.0:0", 2, capture="70-150"), ask(IDS, tokens=12, capture="decode:2-3")]
# The same vector takes one row, so that these run together until the blocks are used up.
CROWD = [ask(IDS[n : n + 60], steer) for n in (0, 60, 120) for steer in ("", "axis=2.0:0")]
STEPS = {
    "plain": [ask()],
    **{steer: [ask(steer=steer)] for steer in STEERS},
    "crowd": CROWD,
    **{f"crowd {n}": [request] for n, request in enumerate(CROWD)},
    "together": [ask(steer=steer) for steer in STEERS],
    "shared": [ask(ids, "axis=2.0:0", share=True) for ids in (SHORT, IDS[20:40], SHORT)],
    "second": [ask(IDS[20:40], "axis=2.0:0")],
    "several": [ask(steer="axis=2.0:0", n=3)],
    "long": [ask(IDS, tokens=8)],
    "long again": [ask(IDS, tokens=8)],
    "long steered": [ask(IDS, "axis=2.0:1", tokens=8)],
    "long steered again": [ask(IDS, "axis=2.0:1", tokens=8)],
    "long steered, salted": [ask(IDS, "axis=2.0:1", tokens=8, salt="a")],
    "long steered, salted again": [ask(IDS, "axis=2.0:1", tokens=8, salt="a")],
    "long after": [ask(IDS, tokens=8)],
    **{f"score {steer}": [ask(IDS, steer, 1, score=100)] for steer in ["", *SCORED]},
    "score object": [ask(IDS, json.loads(LATE), 1, score=100)],
    "lost": ["lost", ask(IDS, "axis=2.0:2", tokens=8), ask(IDS, tokens=8)],
    "found": [ask(IDS, "axis=2.0:2", tokens=8)],
    "decided": [ask(IDS, s, 30) for s in (NEVER, EVER, "axis=2.0:0/decode", "")],
    "decided crowd": [
        {**request, "steer": (NEVER, EVER)[n % 2]} for n, request in enumerate(CROWD)
    ],
    **{f"decided {n}": [{**r, "steer": (NEVER, EVER)[n % 2]}] for n, r in enumerate(CROWD)},
    "seen crowd": [{**request, "capture": "10-59"} for request in CROWD],
    **{f"seen {n}": [{**request, "capture": "10-59"}] for n, request in enumerate(CROWD)},
    "seen decoding": [{**request, "capture": "decode"} for request in CROWD],
    **{f"seen decoding {n}": [{**r, "capture": "decode"}] for n, r in enumerate(CROWD)},
    "seen in chunks": SEEN,
    **{f"seen in chunks {n}": [request] for n, request in enumerate(SEEN)},
    "long after capture": [ask(IDS, tokens=8)],
    "fresh": [ask(IDS, "axis=2.0:2", tokens=8, salt="b")],
}
OPTIONS = {
    "dtype": "float32",
    "max_model_len": 320,
    "max_num_batched_tokens": 32,
    "max_num_seqs": 8,
    "block_size": 32,
    "num_gpu_blocks_override": 14,
    "enable_chunked_prefill": True,
}


@pytest.fixture(scope="module")
def found(tiny_workbench):
    w = tiny_workbench
    model = w.model()
    directions = {b: random_direction(model.width, 50 + b) for b in range(4)}
    vector = SteeringVector(model.base, directions, dict.fromkeys(directions, 8.0), 2)
    w.library.save_vector("axis", vector)
    plan = [{"folder": str(model.folder), "options": OPTIONS, "steps": list(STEPS.values())}]
    more = {"WORKBENCH_ROWS": "2"}
    out = subprocess.run(
        [sys.executable, "-m", "tests_support.offline"],
        input=json.dumps(plan),
        env=environment(w.home.library, model.base, w.home.engines / "cache", **more),
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    answer = json.loads(out.stdout.splitlines()[-1])[0]
    answer["steps"] = dict(zip(STEPS, answer["steps"], strict=True))
    return answer


def test_the_selftest_ran_and_blocks_were_so_few_that_requests_were_preempted(found):
    assert found["hello"]["selftest"]["blocks"] == 4
    assert found["preempted"] > 0


def test_preempted_requests_go_on_as_alone(found):
    steps = found["steps"]
    alone = [steps[f"crowd {n}"][0]["ids"] for n in range(len(CROWD))]
    assert [answer["ids"] for answer in steps["crowd"]] == alone
    assert len({str(ids) for ids in alone}) == len(CROWD)


def test_more_distinct_vectors_than_rows_each_as_alone(found):
    """Eight steerings and two rows."""
    steps = found["steps"]
    alone = [steps[steer][0]["ids"] for steer in STEERS]
    assert [answer["ids"] for answer in steps["together"]] == alone
    assert len({str(ids) for ids in [*alone, steps["plain"][0]["ids"]]}) == 9


def test_sampling_parameters_may_be_shared_and_n_above_one(found):
    steps = found["steps"]
    alone = steps["axis=2.0:0"][0]["ids"][0]
    assert [a["ids"][0] for a in steps["shared"]] == [alone, steps["second"][0]["ids"][0], alone]
    assert steps["several"][0]["ids"] == [alone] * 3


def test_the_salt_keeps_steered_prefixes_apart(found):
    steps = {name: step[0] for name, step in found["steps"].items()}
    assert steps["long"]["cached"] == steps["long steered"]["cached"] == 0
    assert steps["long again"]["cached"] >= 160
    assert steps["long steered again"]["cached"] >= 160
    assert steps["long steered"]["ids"] != steps["long"]["ids"]
    for name in ("long again", "long after"):
        assert steps[name]["ids"] == steps["long"]["ids"], name
    for name in ("again", "salted", "salted again"):
        same = steps[f"long steered{' ' if name == 'again' else ', '}{name}"]
        assert same["ids"] == steps["long steered"]["ids"], name
    assert steps["long steered, salted"]["cached"] == 0, "the client's own salt still counts"
    assert steps["long steered, salted again"]["cached"] >= 160


def test_prompts_in_chunks_score_as_in_transformers(found, tiny_workbench):
    w = tiny_workbench
    theirs = TransformersEngine(w.model(), w.library, w.home)
    plain = sum(found["steps"]["score "][0]["score"])
    for steer in SCORED:
        wanted = theirs.score([(IDS[:100], IDS[100:])], steer=steer)[0]
        score = sum(found["steps"][f"score {steer}"][0]["score"])
        assert score == pytest.approx(wanted, abs=0.05), steer
        assert abs(score - plain) > 0.5, "it would pass unsteered"
    as_object = sum(found["steps"]["score object"][0]["score"])
    as_text = sum(found["steps"][f"score {LATE}"][0]["score"])
    assert as_object == pytest.approx(as_text, abs=1e-3)


def test_the_prompt_decides_whether_what_follows_is_steered(found):
    """In chunks of 32 tokens, and preempted on the way."""
    never, ever, steered, plain = (answer["ids"] for answer in found["steps"]["decided"])
    assert never == plain != steered == ever
    crowd = [answer["ids"] for answer in found["steps"]["decided crowd"]]
    assert crowd == [found["steps"][f"decided {n}"][0]["ids"] for n in range(len(CROWD))]
    assert len({str(ids) for ids in crowd}) == len(crowd)


@pytest.mark.parametrize("which", ["seen", "seen decoding", "seen in chunks"])
def test_each_request_captures_its_own(found, which):
    """In chunks of 32 tokens, preempted on the way, and with a prefix that lies in the cache."""
    crowd = found["steps"]["seen crowd" if which == "seen" else which]
    counts = {"seen": [50] * 6, "seen decoding": [59] * 6, "seen in chunks": [81, 11]}[which]
    for n, (together, count) in enumerate(zip(crowd, counts, strict=True)):
        (alone,) = found["steps"][f"{which} {n}"]
        assert not together["problem"] and not alone["problem"]
        assert together["count"] == alone["count"] == count
        assert together["cached"] == alone["cached"] == 0
        torch.testing.assert_close(torch.tensor(together["mean"]), torch.tensor(alone["mean"]))
        assert len(together["mean"]) == (2 if which == "seen in chunks" and n else 4)
    assert len({str(answer["mean"]) for answer in crowd}) == len(crowd)


def test_what_a_capturing_request_computes_is_cached_for_others(found):
    assert found["steps"]["long after capture"][0]["cached"] >= 160


def test_a_vector_that_the_worker_misses_ends_the_request_and_leaves_no_block(found):
    lost, beside = found["steps"]["lost"]
    assert lost["finish"] == "error" and lost["ids"] == [[]]
    assert "not in the library" in lost["why"]
    assert beside["ids"] == found["steps"]["long"][0]["ids"]
    again, fresh = found["steps"]["found"][0], found["steps"]["fresh"][0]
    assert again["cached"] == 0 and again["ids"] == fresh["ids"]
    assert again["ids"] != beside["ids"]
