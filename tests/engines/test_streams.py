"""Projections on the chunks of a reply: the server's part and the worker's, without vLLM between them."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
import torch
from fastapi import FastAPI
from starlette.testclient import TestClient
from tests_support.loops import run
from tests_support.toys import TOKENS, WIDTH, make

from workbench.engines.vllm.bodies import followed_as
from workbench.engines.vllm.capture import stream
from workbench.engines.vllm.capture.spec import CAPTURE, CAPTURE_ID, FOLLOW_ID, PROJECT
from workbench.engines.vllm.endpoints import WorkbenchEndpoints

CHAT = "/v1/chat/completions"
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]


class Server:
    """A worker on toy layers, and an application that answers as vLLM does, a step for each chunk."""

    def __init__(self, slots=12):
        self.toy, self.steering = make("split", eager=True, slots=slots)
        self.calls = []
        self.broken = False
        self.streams = stream.Streams()

    async def collective_rpc(self, method, args):
        """As the engine's client does it, for one worker; what is JSON comes through."""
        self.calls.append(method)
        await asyncio.sleep(0)
        if self.broken:
            raise RuntimeError("the engine is gone")
        captures = self.steering.captures
        call = {"workbench_projections": captures.projections, "workbench_forget": captures.forget}
        return json.loads(json.dumps([call[method](*args)]))

    def step(self, request, start, count):
        slots_N = self.steering.slots([request])
        self.steering.place(slots_N, np.array([start]), np.array([count]))
        self.steering.ran(slots_N, np.array([start]), np.array([count]))
        self.toy(torch.randn(min(count, TOKENS), WIDTH))

    async def write(self, name, send, tokens, pause=0.0, together=1, capture_id=""):
        """Answer with so many tokens; the worker hears of the end as late as it may."""
        await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        extra = {PROJECT: "a:1", CAPTURE_ID: capture_id or name, FOLLOW_ID: f"our {name}"}
        self.steering.add(name, extra, 3, 0)
        if why := self.steering.refused.pop(name, ""):
            await body(send, {"error": {"message": why}})
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
            return
        for n in range(tokens):
            self.step(name, *((2 + n, 1 if n < tokens - 1 else together) if n else (0, 3)))
            await body(send, chunk(n, "length" if n == tokens - 1 else None))
            await asyncio.sleep(pause)
        await body(send, {"choices": [], "usage": {"completion_tokens": tokens}})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def ask(self, name, tokens, asked=None, path=CHAT, **more):
        """One request through the middleware; the bytes of each event."""
        if asked is None:
            extra = {PROJECT: "a:1", CAPTURE_ID: more.get("capture_id", name)}
            asked = {"stream": True, "vllm_xargs": extra}
        data = followed_as(json.dumps(asked).encode(), f"our {name}")
        sent = []

        async def receive():
            return {"type": "http.request", "body": data, "more_body": False}

        async def send(message):
            if message.get("body"):
                sent.append(message["body"])

        reply = self.streams.follow(self, path, receive, send)
        try:
            await reply.receive()
            await self.write(name, reply.send, tokens, **more)
        finally:
            self.streams.leave(reply)
        return sent

    def fetched(self, name):
        captures = self.steering.captures
        name = f"our {name}"
        return captures.projections({name: 0}, [name])[name][0]


def chunk(number, finish=None):
    choice = {"index": 0, "delta": {"content": f" t{number}"}, "finish_reason": finish}
    return {"object": "chat.completion.chunk", "choices": [choice]}


async def body(send, event):
    data = b"data: " + json.dumps(event).encode() + b"\n\n"
    await send({"type": "http.response.body", "body": data, "more_body": True})


def told(sent):
    """The values, each once and in order, and the chunks without them."""
    values, chunks, problem = [], [], ""
    for event in sent[:-1]:
        found = json.loads(event.removeprefix(b"data: "))
        if (ours := found.pop("workbench", None)) is not None:
            assert ours["projections"]["first"] == len(values)
            values += ours["projections"]["values"]
            problem = ours["projections"].get("problem", "")
        chunks.append((found, len(values)))
    assert sent[-1] == b"data: [DONE]\n\n"
    return values, chunks, problem


def test_values_ride_on_chunks_and_all_are_there_with_the_last(monkeypatch):
    monkeypatch.setattr(stream, "PACE", 0.02)
    server = Server()
    sent = run(server.ask("one", 30, pause=0.01))
    values, chunks, problem = told(sent)
    assert [found for found, _ in chunks[:-1]] == [
        chunk(n, "length" if n == 29 else None) for n in range(30)
    ]
    assert values == server.fetched("one") and len(values) == 29 and not problem
    known = [count for _, count in chunks]
    # The last chunk of the reply has the rest, and no event comes after it but vLLM's own.
    assert known[-2] == 29 and 0 < known[20] < 21 and len(set(known)) > 5
    assert not server.streams._following


def test_the_workers_are_asked_once_for_all_and_not_too_often(monkeypatch):
    monkeypatch.setattr(stream, "PACE", 1000.0)
    server = Server()

    async def walk():
        return await asyncio.gather(*(server.ask(f"r{n}", 40) for n in range(10)))

    for n, sent in enumerate(run(walk())):
        values, _, _ = told(sent)
        assert values == server.fetched(f"r{n}") and len(values) == 39
    # Once at the beginning, and again as all of them end.
    assert len(server.calls) <= 3


def test_an_engine_that_does_not_answer_does_not_hold_the_reply_back():
    server = Server()
    server.broken = True
    values, chunks, problem = told(run(server.ask("one", 5)))
    assert values == [] and problem == stream.UNKNOWN and len(chunks) == 6


def test_what_went_wrong_is_told_with_the_last_chunk():
    # Positions that run together, as after some preemptions, cannot be told apart.
    values, _, problem = told(run(Server().ask("one", 5, together=3)))
    assert len(values) == 3 and "preempted" in problem


def test_who_leaves_leaves_nothing_behind():
    server = Server()

    async def walk():
        asked = asyncio.create_task(server.ask("gone", 1000, pause=0.005))
        await asyncio.sleep(0.1)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        await asyncio.gather(*server.streams._leaving)

    run(walk())
    server.steering.remove("gone")
    captures = server.steering.captures
    assert server.calls[-1] == "workbench_forget"
    assert not captures._kept and not captures._running and not captures._bytes
    assert not server.streams._following and not server.streams._leaving
    assert not server.streams.unfinished


@pytest.mark.parametrize("first", ["one", "two"])
def test_a_second_stream_under_an_id_that_is_taken_harms_nothing(monkeypatch, first):
    monkeypatch.setattr(stream, "PACE", 0.0)
    server = Server()

    async def walk():
        # Which of them is written first does not matter: only one of them is followed to its end.
        asked = {
            name: server.ask(name, 20, pause=0.005, capture_id="same") for name in ("one", "two")
        }
        begun = asyncio.create_task(asked.pop(first))
        await asyncio.sleep(0.03)
        (other,) = asked.values()
        refused = await other
        assert b"still runs" in refused[0] and server.streams.unfinished == {"same": 1}
        return await begun

    values, _, problem = told(run(walk()))
    assert len(values) == 19 and not problem and values == server.fetched(first)
    assert not server.streams.unfinished and not server.streams._following


@pytest.mark.parametrize("extra", [{CAPTURE: "decode"}, {CAPTURE: "0"}, {PROJECT: "a:1"}])
@pytest.mark.parametrize("path", [CHAT, "/v1/responses"])
def test_what_is_captured_is_unfinished_until_the_reply_is(extra, path):
    server = Server()
    seen = []

    async def walk():
        asked = {"stream": True, "vllm_xargs": extra | {CAPTURE_ID: "c1"}}
        data = followed_as(json.dumps(asked).encode(), "ours")

        async def receive():
            return {"type": "http.request", "body": data, "more_body": False}

        async def send(message):
            seen.append(
                (message["type"], message.get("body", b""), dict(server.streams.unfinished))
            )

        reply = server.streams.follow(server, path, receive, send)
        await reply.receive()
        await server.write("ours", reply.send, 3)
        server.streams.leave(reply)

    run(walk())
    assert seen[0][2] == seen[1][2] == {"c1": 1}, "it has begun, and has more to come"
    last = next(n for n, (_, body, _) in enumerate(seen) if b'"length"' in body)
    assert all(not unfinished for *_, unfinished in seen[-2:]), "whoever has it all may fetch"
    assert last == 3 and not seen[last + 2][2]


def test_a_fetch_before_its_reply_has_come_is_refused_and_takes_nothing():
    server, app, endpoints = Server(), FastAPI(), WorkbenchEndpoints()
    endpoints.attach_router(app)
    endpoints.engine = server

    async def gate(scope, receive, send):
        scope.setdefault("state", {})[stream.UNFINISHED] = server.streams.unfinished
        await app(scope, receive, send)

    server.streams.unfinished["c1"] += 1
    answer = TestClient(gate).get("/workbench/captures/other,c1")
    assert answer.status_code == 404 and "'c1' is not complete" in answer.json()["detail"]
    assert not server.calls


@pytest.mark.parametrize(
    ("asked", "path"),
    [
        ({"stream": True}, CHAT),
        ({"stream": True, "messages": [{"content": '"project"'}], "vllm_xargs": {}}, CHAT),
        ({"stream": True, "vllm_xargs": {PROJECT: "a:1"}}, CHAT),
        ({"stream": True, "vllm_xargs": [PROJECT]}, CHAT),
        ([PROJECT], CHAT),
        ({"stream": True, "vllm_xargs": {PROJECT: "a:1", CAPTURE_ID: "x"}}, "/v1/responses"),
    ],
)
def test_other_streams_pass_byte_for_byte(asked, path):
    server = Server()
    values, _, _ = told(sent := run(server.ask("x", 3, asked, path)))
    assert values == [] and server.calls == []
    assert sent[0] == b"data: " + json.dumps(chunk(0)).encode() + b"\n\n"


@pytest.mark.parametrize(
    "event",
    [b": a comment\n\n", b"data: [1]\n\n", b'data: {"error": {}}\n\n', b"data: {\n\n", b"x"],
)
def test_what_is_no_chunk_passes_byte_for_byte(event):
    assert stream._chunk(event) is None
