"""Bodies of requests on their way to vLLM, without an engine."""

from __future__ import annotations

import json
from functools import partial

import pytest
from tests_support.loops import run

from workbench.engines.vllm.bodies import changed, for_lora, with_steer_as_text

TERMS = {"terms": [{"name": "cheerful", "dose": 0.2}]}


def arrive(messages, *changes):
    """What vLLM receives, first and then, of what a client sends."""

    async def walk():
        rest = iter([*messages, {"type": "http.disconnect"}])

        async def receive():
            return next(rest)

        again = await changed(receive, *changes)
        return None if again is None else (await again(), await again())

    return run(walk())


def test_an_object_becomes_text_and_nothing_else_changes():
    body = {"prompt": 'say {"steer": {}}', "vllm_xargs": {"steer_id": "x", "steer": TERMS}}
    found = json.loads(with_steer_as_text(json.dumps(body).encode()))
    assert json.loads(found["vllm_xargs"].pop("steer")) == TERMS
    assert found == {"prompt": body["prompt"], "vllm_xargs": {"steer_id": "x"}}


@pytest.mark.parametrize(
    "body",
    [
        b'{"vllm_xargs":  {"steer": "cheerful=0.2"}}',
        b'{"vllm_xargs":  null, "steer": {}}',
        b'{"vllm_xargs":  ["steer"], "steer": {}}',
        b'{"steer": {}}',
        b'["steer", "steer": {',
        b'[{"steer": {}}]',
        b'{"vllm_xargs": {"steer": {"a":' + b"[" * 100_000,
        b"",
        b"\xff",
    ],
)
def test_what_is_no_such_object_passes_byte_for_byte(body):
    assert with_steer_as_text(body) == body


def test_a_request_asks_for_its_lora_whatever_it_is_made_of():
    named = partial(for_lora, model="digest")
    assert json.loads(named(b'{"model": "m", "prompt": "p"}')) == {"model": "digest", "prompt": "p"}
    for odd in (b"[]", b"{", b"", b"[" * 100_000):
        assert named(odd) == odd


def test_a_body_in_parts_is_changed_as_one_and_then_the_connection_goes_on():
    whole = json.dumps({"vllm_xargs": {"steer": TERMS}}).encode()
    parts = [
        {"type": "http.request", "body": whole[:20], "more_body": True},
        {"type": "http.request", "body": whole[20:]},
    ]
    first, then = arrive(parts, with_steer_as_text)
    assert isinstance(json.loads(first["body"])["vllm_xargs"]["steer"], str)
    assert not first["more_body"] and then["type"] == "http.disconnect"


def test_of_a_client_that_left_half_way_nothing_is_made_up():
    half = {"type": "http.request", "body": b'{"a": ', "more_body": True}
    assert arrive([half], with_steer_as_text) is None
