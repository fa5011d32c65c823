"""Ways in which vLLM runs requests that steering must follow: each says what plain vLLM says.

Tensor parallel by two workers, a step scheduled while the one before runs, drafts of an n-gram: one
engine each, after a plain one, in one process. vLLM leaves scheduling ahead out on a CPU, so that the
script puts it back.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tests_support.offline import environment
from tests_support.tiny import make_family

from vectors.steering.controls import random_direction
from vectors.store import Library
from vectors.types import SteeringVector

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

BASE = "0" * 64
IDS = torch.randint(4, 500, (30,), generator=torch.Generator().manual_seed(5)).tolist()
PROMPTS = IDS[:20], (IDS[:6] * 5)[:28]
LATE = '{"terms": [{"name": "axis", "dose": 2.0, "blocks": [1]}], "start": 37}'
STEERS = ["", "axis=2:1", "axis=-1.5:0-3", "axis=2:1-2/decode", "axis=3:2!turn", LATE]
TOKENS = 32
ANSWERED = [
    {"ids": ids, "steer": steer, "tokens": TOKENS, "id": f"r{p}{s}"}
    for p, ids in enumerate(PROMPTS)
    for s, steer in enumerate(STEERS)
]
SCORED = [{"ids": IDS, "steer": steer, "score": 10} for steer in ("", *STEERS[1:3])]
PROJECTED = [
    {"ids": ids, "steer": steer, "tokens": TOKENS, "project": "axis:2"}
    for ids in PROMPTS
    for steer in STEERS
]
AGAIN = {"ids": IDS, "steer": "axis=2:3", "tokens": 8}
OPTIONS = {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 8,
    "block_size": 32,
    # Too few for all at once, so that some are preempted.
    "num_gpu_blocks_override": 14,
}
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 4,
}
MODES = {
    "plain": {},
    "tensor parallel": {"tensor_parallel_size": 2},
    "scheduled ahead": {"async_scheduling": True},
    "n-gram": {"speculative_config": NGRAM},
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    root = tmp_path_factory.mktemp("modes")
    library = Library(root / "library")
    directions = {b: random_direction(64, 30 + b) for b in range(4)}
    library.save_vector("axis", SteeringVector(BASE, directions, dict.fromkeys(directions, 8.0), 2))
    folder = str(make_family("Llama", root / "Llama"))
    lost = {"tensor parallel": "lost on one of two"}
    plan = [
        {
            "folder": folder,
            "options": OPTIONS | options,
            "steps": [ANSWERED, SCORED, [lost.get(mode, "lost"), AGAIN], [AGAIN]]
            # Drafts cannot be projected. Alone, nothing is preempted.
            + ([] if mode == "n-gram" else [PROJECTED, *([request] for request in PROJECTED)]),
        }
        for mode, options in MODES.items()
    ]
    out = subprocess.run(
        [sys.executable, "-m", "tests_support.offline"],
        input=json.dumps(plan),
        env=environment(library.root, BASE, root / "cache"),
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return dict(zip(MODES, json.loads(out.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_a_mixed_batch_says_what_plain_vllm_says(mode, answers):
    plain, ours = answers["plain"], answers[mode]
    assert ours["preempted"] > 0
    assert [a["ids"] for a in ours["steps"][0]] == [a["ids"] for a in plain["steps"][0]]
    assert len({str(a["ids"]) for a in ours["steps"][0]}) == len(ANSWERED)
    for found, wanted in zip(ours["steps"][1], plain["steps"][1], strict=True):
        assert found["score"] == pytest.approx(wanted["score"], abs=1e-3)


def test_the_modes_were_what_they_are_called(answers):
    assert answers["tensor parallel"]["workers"] == 2
    assert answers["scheduled ahead"]["scheduler"] == "AsyncScheduler"
    accepted, refused = answers["n-gram"]["drafts"]
    assert accepted > 20 and refused > 20, "some drafts were right, and some were not"


@pytest.mark.parametrize("mode", MODES)
def test_receipts_count_every_position_once(mode, answers):
    for request, answer in zip(ANSWERED, answers[mode]["steps"][0], strict=True):
        steer, proof, length = request["steer"], answer["receipt"], len(request["ids"])
        start = 37 if steer == LATE else 0
        prompt = 0 if "/decode" in steer else max(0, length - start)
        decode = length + TOKENS - 1 - max(length, start)
        if not steer:
            assert proof["requests"] == 0
            continue
        counted = proof["prompt"] + proof["decode"] + proof["cached"]
        # What ran behind the reply's end counts: refused drafts, or the step ahead.
        behind = {"n-gram": NGRAM["num_speculative_tokens"], "scheduled ahead": 1}.get(mode, 0)
        assert prompt + decode <= counted <= prompt + decode + behind


@pytest.mark.parametrize("mode", MODES)
def test_what_a_worker_misses_ends_the_request_in_every_mode(mode, answers):
    (lost,), (again,) = answers[mode]["steps"][2:4]
    assert lost["finish"] == "error" and lost["ids"] == [[]]
    assert "not in the library" in lost["why"]
    assert again["ids"] == answers["plain"]["steps"][3][0]["ids"]
    assert again["finish"] == "length"


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "n-gram"])
def test_projections_are_the_same_in_a_batch_where_some_are_preempted(mode, answers):
    together, *alone = answers[mode]["steps"][4:]
    for found, (one,), (plain,) in zip(together, alone, answers["plain"]["steps"][5:], strict=True):
        assert not found["problem"] and found["ids"] == one["ids"] == plain["ids"]
        # The step ahead reads the last token, which nobody sees.
        ahead = len(found["projection"]) - (TOKENS - 1)
        assert 0 <= ahead <= (mode == "scheduled ahead")
        for other in (one, plain):
            wanted = other["projection"][: TOKENS - 1]
            assert found["projection"][: TOKENS - 1] == pytest.approx(wanted, abs=1e-3)
    assert len({str(found["projection"]) for found in together}) == len(PROJECTED)
