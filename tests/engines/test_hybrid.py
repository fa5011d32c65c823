"""A Gated DeltaNet hybrid under pressure in real vLLM: prompts in chunks, preemption, the prefix cache.

Its attention blocks hold 640 tokens, as many as a recurrent state takes room, so that prompts are long here:
replies cross the block's end, where some are preempted, and a prompt's first 640 tokens are cached.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tests_support.offline import environment
from tests_support.reference import reference_of
from tests_support.tiny import make_family

from vectors.steering.controls import random_direction
from vectors.store import Library
from vectors.types import SteeringVector

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

BASE = "0" * 64
KIND = "Qwen3_5"
BLOCK = 640
IDS = torch.randint(4, 500, (700,), generator=torch.Generator().manual_seed(5)).tolist()
ALL, ONE, DECODED = "axis=1.0:0-3", "axis=-1.5:2", "axis=2.0:1-2/decode"
STEERS = ["", ALL, ONE, DECODED, "", ALL]
TOKENS = 40
CROWD = [
    {"ids": IDS[: 615 + n], "steer": steer, "tokens": TOKENS, "id": f"r{n}"}
    for n, steer in enumerate(STEERS)
]
PREFIXED = [{"ids": IDS, "steer": steer, "tokens": 12} for steer in ("", "", ALL, ALL, "")]
AFTER = 600
SCORED = [{"ids": IDS, "steer": steer, "score": AFTER} for steer in ("", ALL, ONE)]
SPAN = slice(200, 680)  # of three chunks
CAPTURED = [{"ids": IDS, "steer": ALL, "capture": f"{SPAN.start}-{SPAN.stop - 1}"}]
OPTIONS = {
    "dtype": "bfloat16",  # vLLM's Gated DeltaNet on the CPU takes no other
    "hf_overrides": {"max_position_embeddings": 2048},
    "max_model_len": 1408,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 4,
    "num_gpu_blocks_override": 14,
    "enable_prefix_caching": True,
}
CLOSE, LIKELY, FAR = 0.2, 0.3, 1.0
"""Of a steering's whole effect; nats that bfloat16 moves a token by; nats that another steering does."""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    found = Library(tmp_path_factory.mktemp("hybrid") / "library")
    directions = {b: random_direction(64, 30 + b) for b in range(4)}
    found.save_vector("axis", SteeringVector(BASE, directions, dict.fromkeys(directions, 8.0), 2))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_family(KIND, tmp_path_factory.mktemp("checkpoint") / KIND)


@pytest.fixture(scope="module")
def found(folder, library, tmp_path_factory):
    steps = [CROWD, *([request] for request in PREFIXED), SCORED, CAPTURED]
    out = subprocess.run(
        [sys.executable, "-m", "tests_support.offline"],
        input=json.dumps([{"folder": str(folder), "options": OPTIONS, "steps": steps}]),
        env=environment(library.root, BASE, tmp_path_factory.mktemp("cache")),
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout.splitlines()[-1])[0]


@pytest.fixture(scope="module")
def behind(folder, library):
    """How far a token that vLLM chose falls behind the likeliest one of transformers, at most."""
    run = reference_of({KIND: folder}, library, BASE)

    def at_most(request, answer, steer=None):
        steer = request["steer"] if steer is None else steer
        prompt, (ids,) = request["ids"], answer["ids"]
        start = len(prompt) if "/decode" in steer else 0
        logp_TV = run(KIND, prompt + ids, steer, start=start)[0][len(prompt) - 1 : -1]
        return float((logp_TV.amax(-1) - logp_TV[range(len(ids)), ids]).max())

    return at_most


def test_replies_that_were_preempted_say_what_transformers_would(found, behind):
    assert found["hello"]["selftest"]["blocks"] == 4 and found["preempted"] > 0
    for request, answer in zip(CROWD, found["steps"][0], strict=True):
        assert len(answer["ids"][0]) == TOKENS
        assert behind(request, answer) < LIKELY, request["steer"]
        for other in {"", ALL, ONE, DECODED} - {request["steer"]}:
            assert behind(request, answer, other) > FAR, f"it would pass as {other!r}"


def test_receipts_count_what_is_read_again_once(found):
    for request, answer in zip(CROWD, found["steps"][0], strict=True):
        steer, proof, length = request["steer"], answer["receipt"], len(request["ids"])
        prompt = length if steer and "/decode" not in steer else 0
        decode = TOKENS - 1 if steer else 0
        assert proof["prompt"] + proof["cached"] + proof["decode"] == prompt + decode
        assert proof["requests"] == bool(steer)


def test_states_are_cached_for_the_same_steering_alone(found, behind):
    steps = [step[0] for step in found["steps"][1 : 1 + len(PREFIXED)]]
    assert [answer["cached"] for answer in steps] == [0, BLOCK, 0, BLOCK, BLOCK]
    for request, answer in zip(PREFIXED, steps, strict=True):
        assert behind(request, answer) < LIKELY
        assert behind(request, answer, "" if request["steer"] else ALL) > FAR


def test_prompts_in_chunks_score_and_are_captured_as_in_transformers(found, folder, library):
    run = reference_of({KIND: folder}, library, BASE)
    wanted = {}
    for request in SCORED:
        logp_TV = run(KIND, IDS, request["steer"])[0]
        wanted[request["steer"]] = logp_TV[range(AFTER - 1, len(IDS) - 1), IDS[AFTER:]]
    for request, answer in zip(SCORED[1:], found["steps"][-2][1:], strict=True):
        ours_T, steer = torch.tensor(answer["score"]), request["steer"]
        effect = (wanted[steer] - wanted[""]).norm()
        assert (ours_T - wanted[steer]).norm() / effect < CLOSE, steer
        other = ONE if steer == ALL else ALL
        assert (ours_T - wanted[other]).norm() / effect > 3 * CLOSE, steer
    (captured,) = found["steps"][-1]
    means = [
        run(KIND, IDS, ALL, dtype=dtype)[1][:, SPAN].mean(1)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert captured["count"] == SPAN.stop - SPAN.start and not captured["problem"]
    off = (torch.tensor(captured["mean"]) - means[0]).norm()
    assert off < 1.5 * (means[1] - means[0]).norm(), "as close as transformers' own bfloat16"
