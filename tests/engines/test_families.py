"""Decoders of other families in real vLLM, steered as in transformers; layers are found by structure.

Every family is a tiny random checkpoint, and all of them run one after another in one process. vLLM on
the CPU runs all that are named here: none is left out.
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

DENSE = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma3"]
HYBRID = ["Qwen3Next", "Qwen3_5"]  # vLLM's Gated DeltaNet on the CPU takes bfloat16 alone
BASE = "0" * 64
IDS = torch.randint(4, 500, (90,), generator=torch.Generator().manual_seed(5)).tolist()
AFTER = 40
LATE = '{"terms": [{"name": "axis", "dose": 1.5, "blocks": [1, 3]}], "start": 45}'
STEERS = ["axis=1.0:0-3", "axis=-1.5:2", "axis=1:0-3!ablate", "axis=1.5:2!turn", LATE]
DECODED = "axis=2.0:1-2/decode"
PROJECTED = "axis:2"
CAPTURED = ["", "axis=1.0:0-3"]
SPANS = {"20-79": slice(20, 80), "last": slice(len(IDS) - 1, len(IDS))}
CLOSE = {False: 1e-4, True: 0.2}  # of the steering's whole effect: float32, and a hybrid's bfloat16
OPTIONS = {
    "max_model_len": 256,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 4,
    "num_gpu_blocks_override": 16,
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    found = Library(tmp_path_factory.mktemp("families") / "library")
    for seed, name in ((30, "axis"), (40, "other")):
        directions = {b: random_direction(64, seed + b) for b in range(4)}
        vector = SteeringVector(BASE, directions, dict.fromkeys(directions, 8.0), 2)
        found.save_vector(name, vector)
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: make_family(kind, root / kind) for kind in [*DENSE, *HYBRID]}


@pytest.fixture(scope="module")
def answers(folders, library, tmp_path_factory):
    """What vLLM says: the score of each steering, and what it decodes."""
    scored = [{"ids": IDS, "steer": steer, "score": AFTER} for steer in ["", *STEERS]]
    decoded = [{"ids": IDS[:20], "steer": steer, "tokens": 12} for steer in ["", DECODED]]
    projected = [
        {"ids": IDS[:20], "steer": s, "tokens": 12, "project": PROJECTED} for s in ["", DECODED]
    ]
    captured = [{"ids": IDS, "steer": s, "capture": c} for s in CAPTURED for c in SPANS]
    plan = [
        {
            "folder": str(folder),
            "options": OPTIONS | {"dtype": "bfloat16" if kind in HYBRID else "float32"},
            "steps": [scored, decoded, captured, projected],
        }
        for kind, folder in folders.items()
    ]
    out = subprocess.run(
        [sys.executable, "-m", "tests_support.offline"],
        input=json.dumps(plan),
        env=environment(library.root, BASE, tmp_path_factory.mktemp("cache")),
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return dict(zip(folders, json.loads(out.stdout.splitlines()[-1]), strict=True))


@pytest.fixture(scope="module")
def reference(folders, library):
    return reference_of(folders, library, BASE)


def score(found):
    """The log-probability of each token of the continuation."""
    logp_TV, _ = found
    return logp_TV[range(AFTER - 1, len(IDS) - 1), IDS[AFTER:]]


@pytest.mark.parametrize("kind", [*DENSE, *HYBRID])
def test_a_prompt_scores_as_in_transformers(kind, answers, reference):
    hello = answers[kind]["hello"]
    assert hello["selftest"]["blocks"] == 4, "each decoder layer was found and tested at load"
    _, *found = (torch.tensor(answer["score"]) for answer in answers[kind]["steps"][0])
    for steer, ours_T in zip(STEERS, found, strict=True):
        wanted_T = score(reference(kind, IDS, steer))
        wrong = ["", steer.replace("axis", "other"), *(s for s in STEERS if s != steer)]
        effect = (wanted_T - score(reference(kind, IDS, ""))).norm()
        assert (ours_T - wanted_T).norm() / effect < CLOSE[kind in HYBRID], steer
        for other in wrong:
            away = (ours_T - score(reference(kind, IDS, other))).norm() / effect
            assert away > 0.6, f"{steer} would pass as {other or 'unsteered'}"


@pytest.mark.parametrize("kind", [*DENSE, *HYBRID])
def test_decoding_says_what_transformers_would(kind, answers, reference):
    (plain,), (steered,) = (answer["ids"] for answer in answers[kind]["steps"][1])
    assert plain[0] == steered[0], "the first token comes from the prompt, which is not steered"

    def behind(ids, steer):
        """How far a token that vLLM chose falls behind the likeliest one, at most."""
        logp_TV = reference(kind, IDS[:20] + ids, steer, start=20)[0][19:-1]
        return float((logp_TV.amax(-1) - logp_TV[range(len(ids)), ids]).max())

    assert behind(plain, "") < CLOSE[kind in HYBRID]
    assert behind(steered, DECODED) < CLOSE[kind in HYBRID]
    assert behind(steered, "") > 0.4, "it would pass unsteered"


@pytest.mark.parametrize("kind", [*DENSE, *HYBRID])
def test_what_is_captured_is_the_stream_of_transformers(kind, answers, reference):
    """Dense ones to float32's rounding; a hybrid as close as transformers' own bfloat16 comes."""
    found = iter(answers[kind]["steps"][2])
    streams = {steer: reference(kind, IDS, steer)[1] for steer in CAPTURED}
    for steer, stream_LTD in streams.items():
        rounded_LTD = (
            reference(kind, IDS, steer, dtype=torch.bfloat16)[1] if kind in HYBRID else None
        )
        (other_LTD,) = (streams[s] for s in CAPTURED if s != steer)
        for positions in SPANS.values():
            captured = next(found)
            mean_LD, norm_L = torch.tensor(captured["mean"]), torch.tensor(captured["norm"])
            span_LTD = stream_LTD[:, positions]
            assert captured["count"] == span_LTD.shape[1] and not captured["problem"]
            allowed = 1e-5
            if rounded_LTD is not None:
                allowed = 1.5 * relative(rounded_LTD[:, positions].mean(1), span_LTD.mean(1))
            assert relative(mean_LD, span_LTD.mean(1)) < allowed, (steer, positions)
            assert relative(norm_L, span_LTD.norm(dim=-1).mean(1)) < allowed, (steer, positions)
            assert relative(mean_LD, other_LTD[:, positions].mean(1)) > 3 * allowed


@pytest.mark.parametrize("kind", [*DENSE, *HYBRID])
def test_each_token_is_projected_as_in_transformers(kind, answers, reference, library):
    _, vector = library.load_vector("axis")
    v_D, norm = vector.directions[2], vector.mean_norms[2]
    found = []
    for steer, answer in zip(["", DECODED], answers[kind]["steps"][3], strict=True):
        (ids,) = answer["ids"]
        streams = [
            reference(kind, IDS[:20] + ids, steer, start=20, dtype=dtype)[1][2, 20:-1]
            for dtype in (torch.float32, torch.bfloat16)
        ]
        wanted_T, rounded_T = ((h_TD @ v_D) / norm for h_TD in streams)
        found.append(torch.tensor(answer["projection"]))
        assert not answer["problem"] and len(found[-1]) == 11
        allowed = 2 * float((rounded_T - wanted_T).norm()) if kind in HYBRID else 1e-4
        assert (found[-1] - wanted_T).norm() < allowed
    assert (found[1] - found[0]).mean() > 1, "steering by 2.0 along the vector is seen"


def relative(found, wanted):
    """Relative root mean square."""
    return float((found - wanted).norm() / wanted.norm())
