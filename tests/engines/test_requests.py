"""What a client may send beside plain chats, on the real server: each steered right, or refused."""

from __future__ import annotations

import dataclasses
import json
import os
import re

import httpx
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from vectors.errors import SteeringNotApplied, WorkbenchError
from vectors.steering.controls import random_direction
from vectors.types import SteeringVector
from workbench.engines.base import Request, Sampling
from workbench.engines.transformers import TransformersEngine
from workbench.engines.vllm.spec import resolve_request

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def engine(tiny_workbench):
    base, width = tiny_workbench.model().base, tiny_workbench.model().width
    for number, name in enumerate(("south", "west")):
        directions = {b: random_direction(width, 100 * number + b + 7) for b in range(4)}
        vector = SteeringVector(base, directions, dict.fromkeys(directions, 8.0), 2)
        tiny_workbench.library.save_vector(name, vector)
    for name, size, blocks in (("narrow", width // 2, 4), ("tall", width, 9), ("rotten", width, 4)):
        directions = {b: random_direction(size, b) for b in range(blocks)}
        vector = SteeringVector(base, directions, dict.fromkeys(directions, 8.0), blocks - 1)
        tiny_workbench.library.save_vector(name, vector)
    return tiny_workbench.engine()


@pytest.fixture(scope="module")
def post(engine, tiny_workbench):
    """Send a body as any other client would; return status and answer."""
    status = tiny_workbench.engine_status()
    headers = {"authorization": engine._http.headers["authorization"]}

    def send(path="/v1/completions", **body):
        body = {"model": "tiny", "prompt": "Hello there", "max_tokens": 8, "temperature": 0} | body
        if "messages" in body:
            del body["prompt"]
        return httpx.post(f"{status.url}{path}", json=body, headers=headers, timeout=300)

    return send


def receipt(engine, name):
    return engine._http.get(f"/workbench/receipts/{name}").json()


def texts(reply):
    assert reply.status_code == 200, reply.text
    return [choice["text"] for choice in reply.json()["choices"]]


def test_each_of_n_completions_is_steered(engine, post):
    plain, alone = (
        texts(post())[0],
        texts(post(vllm_xargs={"steer": "south=2"}))[0],
    )
    # vLLM takes n > 1 for sampling alone; among one token it leaves no choice.
    sampled = {"n": 3, "temperature": 1, "top_k": 1}
    several = texts(post(**sampled, vllm_xargs={"steer": "south=2", "steer_id": "three"}))
    assert several == [alone] * 3 != [plain] * 3
    proof = receipt(engine, "three")
    assert proof["requests"] == 3 and proof["least"] > 8


def test_a_batch_of_prompts_shares_its_steering(engine, post):
    prompts = ["one", "two words", "and three words"]
    together = texts(post(prompt=prompts, vllm_xargs={"steer": "west=2", "steer_id": "batch"}))
    alone = [texts(post(prompt=p, vllm_xargs={"steer": "west=2"}))[0] for p in prompts]
    assert together == alone and receipt(engine, "batch")["requests"] == 3


def test_structured_output_is_steered_within_its_grammar(engine, post):
    grammar = {"structured_outputs": {"regex": "[a-z]{12}"}, "max_tokens": 30}
    plain = texts(post(**grammar))[0]
    steered = texts(post(**grammar, vllm_xargs={"steer": "south=3", "steer_id": "regex"}))[0]
    assert re.fullmatch("[a-z]{12}", plain) and re.fullmatch("[a-z]{12}", steered)
    assert plain != steered and receipt(engine, "regex")["decode"] > 0


def test_beam_search_is_refused_when_it_is_steered(post):
    refused = post(use_beam_search=True, n=2, vllm_xargs={"steer": "south=1"})
    assert refused.status_code == 400 and "leave 'use_beam_search' out" in refused.text


@pytest.mark.parametrize(
    "steer",
    [
        "south=1!ablate",
        "south=0.6:1!clamp,west=-0.4:2",
        "south=0.8:0-3!turn",
        "south=0.5:0-3,west=0.7:1!ablate",
        "south=1:2/prompt!ablate",
        '{"terms": [{"name": "south", "dose": 1.0}], "start": 7}',
        '{"terms": [{"name": "west", "dose": 1.0, "operator": "ablate", "blocks": [0, 3]}], "start": 3}',
    ],
)
def test_every_operator_scores_as_in_transformers(engine, tiny_workbench, steer):
    w = tiny_workbench
    theirs = TransformersEngine(w.model(), w.library, w.home)
    rng = torch.Generator().manual_seed(1)
    pairs = [
        tuple(torch.randint(4, 260, (n,), generator=rng).tolist() for n in lengths)
        for lengths in ((5, 3), (40, 17))
    ]
    ours, wanted = engine.score(pairs, steer=steer), theirs.score(pairs, steer=steer)
    assert ours == pytest.approx(wanted, abs=2e-2, rel=2e-4)
    assert ours != pytest.approx(engine.score(pairs), abs=0.1), "it would pass unsteered"


@pytest.mark.parametrize("steer", ["south=1:1/decode!ablate", "west=1.5:0-2/decode!turn"])
def test_decoding_with_an_operator_says_what_transformers_says(engine, tiny_workbench, steer):
    w = tiny_workbench
    request = Request(({"role": "user", "content": "Hi"},), sampling=Sampling(12, 0.0))
    steered = dataclasses.replace(request, steer=steer)
    theirs = TransformersEngine(w.model(), w.library, w.home)
    wanted = theirs.generate([steered])[0]
    found = engine.generate([steered])[0]
    assert found.text == wanted.text != engine.generate([request])[0].text
    assert found.receipt.decode == wanted.receipt.decode


@pytest.mark.parametrize("harm", ["missing", "truncated", "altered"])
def test_a_vector_that_is_harmed_while_the_engine_runs_is_a_400(engine, post, tiny_workbench, harm):
    library = tiny_workbench.library
    steered = {"vllm_xargs": {"steer": "west=2"}}
    wanted, beside = texts(post(**steered)), texts(post(vllm_xargs={"steer": "south=2"}))
    path = library.objects.path(library.get("west").manifest.objects()[0])
    data = path.read_bytes()
    path.chmod(0o644)
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-9] if harm == "truncated" else data[:-9] + b"\0" * 9)
    try:
        refused = post(**steered)
        assert refused.status_code == 400, refused.text
        assert "restore it from a copy of the library" in refused.text
        assert texts(post(vllm_xargs={"steer": "south=2"})) == beside, "other requests go on"
    finally:
        path.write_bytes(data)
    assert texts(post(**steered)) == wanted


TERMS = st.text("south=west0123456789.:-/,!@decodeprmtnaiablute ", max_size=40)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["terms", "start", "name", "dose", "blocks", "phase", "operator", "x"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)
HALF_RIGHT = st.fixed_dictionaries(
    {
        "terms": st.lists(
            st.fixed_dictionaries({"name": st.just("south"), "dose": JSON}), max_size=2
        )
    },
    optional={"start": JSON},
)
# Halves of characters, which no HTTP body can hold, are left out.
ANY = st.one_of(
    TERMS,
    st.text(st.characters(codec="utf-8"), max_size=30),
    JSON.map(json.dumps),
    HALF_RIGHT.map(json.dumps),
)


def is_right(text, library, base):
    try:
        resolve_request(text, library, base)
    except WorkbenchError:
        return False
    return True


@settings(max_examples=120, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(steer=st.one_of(ANY, st.integers(-9, 9), st.lists(ANY, max_size=2)))
def test_whatever_is_sent_as_steering_is_refused_in_a_sentence(engine, post, tiny_workbench, steer):
    library, base = tiny_workbench.library, tiny_workbench.model().base
    right = isinstance(steer, str) and is_right(steer, library, base)
    reply = post(max_tokens=1, vllm_xargs={"steer": steer})
    assert reply.status_code == (200 if right else 400), (steer, reply.text)
    if not right:
        words = reply.json()["error"]["message"]
        assert len(words) > 20 and "Traceback" not in words and "Error(" not in words, words


@settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(steer=st.one_of(HALF_RIGHT, st.dictionaries(st.text(max_size=5), JSON, max_size=3)))
def test_an_object_says_what_its_text_says(post, steer):
    assume(all(word not in json.dumps(steer) for word in ("NaN", "Infinity")))  # no HTTP body can
    as_object, as_text = (
        post(max_tokens=1, logprobs=1, vllm_xargs={"steer": one})
        for one in (steer, json.dumps(steer))
    )
    assert as_object.status_code == as_text.status_code, as_object.text
    if as_text.status_code == 200:
        assert texts(as_object) == texts(as_text)
    else:
        assert as_object.json()["error"]["message"] == as_text.json()["error"]["message"]


def test_the_engine_is_the_same_afterwards(engine, post):
    assert texts(post(vllm_xargs={"steer": "south=2"})) != texts(post())


@pytest.mark.parametrize(
    "asked",
    [
        {"steer": "{}=1"},
        {"steer": "south=1,{}=-0.5!ablate"},
        {"project": "{}", "capture_id": "fit1"},
        {
            "steer": '{{"terms": [{{"name": "south", "dose": 1, "phase": "decode"}}], '
            '"condition": {{"name": "{}", "above": 0.5}}}}'
        },
    ],
)
@pytest.mark.parametrize(
    ("name", "words"), [("narrow", "width 32"), ("tall", "this model has 4 blocks")]
)
def test_a_vector_that_does_not_fit_the_model_is_a_400(post, asked, name, words):
    xargs = {key: text.format(name) for key, text in asked.items()}
    chat = {"messages": [{"role": "user", "content": "x"}]}
    for path, more in (("/v1/completions", {}), ("/v1/chat/completions", chat)):
        refused = post(path, vllm_xargs=xargs, **more)
        assert refused.status_code == 400, refused.text
        assert words in refused.json()["error"]["message"]
    # vLLM has begun to answer by then, whatever was wrong.
    streamed = post(vllm_xargs=xargs, stream=True).text
    assert '"code": 400' in streamed and words in streamed and "choices" not in streamed


def test_an_id_of_a_projection_that_nobody_fetched_serves_again(engine, post):
    xargs = {"project": "south", "capture_id": "mine1"}
    for _ in range(3):
        assert '"finish_reason":"length"' in post(stream=True, vllm_xargs=xargs).text
    assert engine._http.get("/workbench/captures/mine1").status_code == 200


@pytest.mark.parametrize("extra", [{"capture": "decode"}, {"project": "south"}])
def test_what_is_still_being_written_is_not_fetched_and_not_lost(engine, extra):
    body = {"model": "tiny", "prompt": "Hello there", "max_tokens": 200, "stream": True}
    body |= {"ignore_eos": True, "vllm_xargs": extra | {"capture_id": "early1"}}
    with engine._http.stream("POST", "/v1/completions", json=body) as reply:
        lines = reply.iter_lines()
        assert next(lines).startswith("data: {")
        early = engine._http.get("/workbench/captures/early1")
        assert early.status_code == 404 and "still being written" in early.text
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    found = load(engine._http.get("/workbench/captures/early1").raise_for_status().content)
    count = found["early1.projection"].numel() if "project" in extra else found["early1.count"]
    assert count == 199


def test_what_a_worker_cannot_steer_is_an_error_for_every_client(engine, post, tiny_workbench):
    clean = texts(post())[0]
    # The front end reads it now, and the worker when it is first steered by.
    texts(post(vllm_xargs={"steer": "rotten=0"}))
    library = tiny_workbench.library
    path = library.objects.path(library.get("rotten").manifest.objects()[0])
    data, state = path.read_bytes(), path.stat()
    path.chmod(0o644)
    path.write_bytes(data[:-9] + b"\0" * 9)
    # As a disk that forgets does it, which tells no one.
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    xargs = {"steer": "rotten=1", "steer_id": "rotten1"}
    reply = post(vllm_xargs=xargs)
    assert reply.status_code == 500 and "choices" not in reply.text
    assert "is damaged" in receipt(engine, "rotten1")["problem"]
    streamed = post(vllm_xargs={"steer": "rotten=1"}, stream=True)
    assert '"error"' in streamed.text and '"text":"' not in streamed.text.replace('"text":""', "")
    several = post(n=2, temperature=1, vllm_xargs={"steer": "rotten=1"})
    assert several.status_code == 500
    with pytest.raises(SteeringNotApplied, match="is damaged"):
        engine.generate([Request(({"role": "user", "content": "x"},), "rotten=1")])
    with pytest.raises(SteeringNotApplied, match="is damaged"):
        list(engine.stream(Request(({"role": "user", "content": "x"},), "rotten=1")))
    with pytest.raises(SteeringNotApplied, match="is damaged"):
        engine.score([([5, 6], [7])], steer="rotten=1")
    assert texts(post())[0] == clean, "the engine goes on"
