"""The weight gate without an engine: order, draining, failure, departure; and what it lets through."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.testclient import TestClient
from tests_support.loops import run

from workbench.engines.vllm.endpoints import WorkbenchEndpoints
from workbench.engines.vllm.gate import GUARDED, HARMLESS, MESSAGES, WeightGate
from workbench.engines.vllm.turns import Turns


class World:
    """Requests that note when they run, and swaps that check that nobody does."""

    def __init__(self) -> None:
        self.turns = Turns(self.swap)
        self.log: list[str] = []
        self.active = 0
        self.refused: set[str] = set()
        self.swap_seconds = 0.001
        self.loaded = "base"

    async def swap(self, wanted: str) -> None:
        assert self.active == 0, "weights moved under a running request"
        self.loaded = "half of each"
        await asyncio.sleep(self.swap_seconds)
        if wanted in self.refused:
            raise RuntimeError(f"no {wanted}")
        self.loaded = wanted
        self.log.append(f"swap {wanted}")

    async def ask(self, wanted: str, seconds: float = 0.002) -> str:
        await self.turns.enter(wanted)
        try:
            self.active += 1
            assert self.turns.present == wanted == self.loaded
            await asyncio.sleep(seconds)
            self.log.append(wanted)
            return self.turns.present
        finally:
            self.active -= 1
            self.turns.leave()


def test_every_request_runs_on_its_weights_and_none_starves():
    async def walk():
        world = World()
        wanted = [["base", "a", "b"][i % 3] for i in range(60)]
        assert await asyncio.gather(*(world.ask(w) for w in wanted)) == wanted
        assert world.turns.running == 0 and not world.turns.waiting
        # Equal states run together: far fewer swaps than requests.
        assert sum(line.startswith("swap") for line in world.log) <= 6

    run(walk())


def test_newcomers_of_the_old_state_wait_behind_a_swap():
    async def walk():
        world = World()
        first = asyncio.create_task(world.ask("base", 0.05))
        await asyncio.sleep(0.01)
        swapped = asyncio.create_task(world.ask("a"))
        await asyncio.sleep(0.005)
        late = asyncio.create_task(world.ask("base"))
        await asyncio.gather(first, swapped, late)
        assert world.log == ["base", "swap a", "a", "swap base", "base"]

    run(walk())


def test_a_swap_that_fails_is_told_to_its_request_alone():
    async def walk():
        world = World()
        world.refused = {"broken"}
        results = await asyncio.gather(
            world.ask("base"), world.ask("broken"), world.ask("a"), return_exceptions=True
        )
        assert results[0] == "base" and results[2] == "a"
        assert isinstance(results[1], RuntimeError)
        assert await world.ask("base") == "base"

    run(walk())


@pytest.mark.parametrize("leave_after", [0.0, 0.002, 0.012])
def test_a_request_that_leaves_while_waiting_blocks_nobody(leave_after):
    async def walk():
        world = World()
        first = asyncio.create_task(world.ask("base", 0.01))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(world.ask("a", 0.05))
        await asyncio.sleep(leave_after)
        waiting.cancel()
        await asyncio.gather(first, waiting, return_exceptions=True)
        assert await world.ask("b") == "b"
        assert world.turns.running == 0

    run(walk())


def test_who_waits_behind_a_request_that_leaves_goes_in_beside_those_who_run():
    async def walk():
        world = World()
        long = asyncio.create_task(world.ask("base", 10))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(world.ask("a"))
        await asyncio.sleep(0)
        late = asyncio.create_task(world.ask("base"))
        await asyncio.sleep(0.01)
        assert not world.log
        waiting.cancel()
        assert await asyncio.wait_for(late, 5) == "base"
        long.cancel()
        await asyncio.gather(long, waiting, return_exceptions=True)
        assert world.log == ["base"] and world.turns.running == 0

    run(walk())


@pytest.mark.parametrize("moment", ["before", "after", "both", "cancelled"])
def test_whoever_leaves_before_its_turn_takes_none(moment):
    async def walk():
        world = World()
        gone = asyncio.Event()
        long = asyncio.create_task(world.ask("base", 0.02))
        await asyncio.sleep(0)
        turn = asyncio.create_task(world.turns.enter_unless(gone.wait, "a"))
        await asyncio.sleep(0)
        if moment == "before":
            gone.set()
            assert not await turn
            await long
        elif moment == "cancelled":
            world.swap_seconds = 0
            await long
            while not world.turns.running:
                await asyncio.sleep(0)
            turn.cancel()
            await asyncio.gather(turn, return_exceptions=True)
        else:
            await long
            if moment == "both":
                while not world.turns.running:
                    await asyncio.sleep(0)
                gone.set()
            assert await turn
            world.turns.leave()
        assert world.turns.running == 0 and not world.turns.waiting
        assert world.log == (["base"] if moment == "before" else ["base", "swap a"])
        assert await asyncio.wait_for(world.ask("b"), 5) == "b"

    run(walk())


def test_after_a_swap_that_failed_nobody_runs_on_what_it_left():
    async def walk():
        world = World()
        world.refused = {"broken"}
        with pytest.raises(RuntimeError, match="no broken"):
            await world.ask("broken")
        assert await world.ask("base") == "base"
        assert world.log == ["swap base", "base"], "the base is loaded again"

    run(walk())


@pytest.mark.parametrize("broken", [False, True])
def test_a_request_that_leaves_during_its_swap_blocks_nobody(broken):
    async def walk():
        world = World()
        world.swap_seconds = 0.02
        world.refused = {"a"} if broken else set()
        leaving = asyncio.create_task(world.ask("a"))
        await asyncio.sleep(0.005)
        others = [asyncio.create_task(world.ask(wanted)) for wanted in ("b", "base")]
        await asyncio.sleep(0.005)
        leaving.cancel()
        results = await asyncio.gather(leaving, *others, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError) and results[1:] == ["b", "base"]
        assert await world.ask("a" if not broken else "b")
        assert world.turns.running == 0 and not world.turns.waiting

    run(walk())


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """The folder of a gate's weights."""
    for name in ("WORKBENCH_WEIGHTS", "WORKBENCH_CHECKPOINT"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.delenv("WORKBENCH_TOKEN", raising=False)
    return tmp_path


@pytest.fixture
def digest(weights):
    """Of weights that are materialised."""
    found = "a" * 64
    (weights / found).mkdir()
    (weights / found / "config.json").write_text("{}")
    return found


@pytest.fixture
def post(weights):
    """Post to a path of a server that would answer anything; return status and text."""
    app = FastAPI()
    app.state.engine_client = None

    @app.api_route("/{path:path}", methods=["GET", "POST", "PUT"])
    async def anything(request: Request) -> str:
        return f"reached {request.url.path}"

    app.add_middleware(WeightGate)

    def send(path: str, method: str = "POST", **headers: str) -> tuple[int, str]:
        answers: list[httpx.Response] = []

        async def walk() -> None:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                sent = {name: value.encode("latin-1") for name, value in headers.items()}
                answers.append(await client.request(method, path, json={}, headers=sent))

        run(walk())
        return answers[0].status_code, answers[0].text

    return send


GENERATING = (
    "/generative_scoring",
    "/v1/systemone",
    "/invocations",
    "/cohere/v2/chat",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/score",
    "/v1/score",
    "/rerank",
    "/v1/rerank",
    "/v2/rerank",
    "/classify",
    "/pooling",
    "/v1/embeddings",
    "/v2/embed",
)
MOVING = (
    "/collective_rpc",
    "/update_weights",
    "/start_weight_update",
    "/finish_weight_update",
    "/sleep",
    "/wake_up",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/scale_elastic_ep",
)


@pytest.mark.parametrize("path", [*GENERATING, *MOVING, "/invocations/"])
def test_a_route_that_would_pass_the_gate_by_is_refused(post, path):
    status, text = post(path)
    assert status == 400 and f"POST {path}, which" in text
    assert all(known in text for known in GUARDED)
    assert post(path, "PUT")[0] == 400
    assert post(path, "GET")[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        *GUARDED,
        *HARMLESS,
        "/v1/chat/completions/batch",
        "/v1/chat/completions/render",
        "/v1/messages/count_tokens",
        "/v1/responses/some/cancel",
    ],
)
def test_what_steers_or_does_not_generate_passes(post, path):
    status, text = post(path)
    assert status == 200 and f"reached {path}" in text


def test_messages_are_refused_by_a_vllm_that_drops_what_steers_them(monkeypatch, post):
    class Older(BaseModel):
        max_tokens: int

    monkeypatch.setattr("vllm.entrypoints.anthropic.protocol.AnthropicMessagesRequest", Older)
    status, text = post(MESSAGES)
    assert status == 400 and text.count(MESSAGES) == 1
    assert post("/v1/completions")[0] == 200


@pytest.mark.parametrize("leaves", [True, False])
def test_for_a_client_that_left_half_way_no_weights_move(digest, leaves):
    app = FastAPI()
    app.state.engine_client = None  # so that a swap would fail, and be answered
    app.add_middleware(WeightGate)
    begun = {"type": "http.request", "body": b'{"prompt": ', "more_body": leaves}
    arriving, sent = iter([begun, {"type": "http.disconnect"}]), []

    async def receive():
        return next(arriving)

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [(b"x-workbench-weights", digest.encode())],
    }
    run(app(scope, receive, send))
    assert [m["status"] for m in sent if "status" in m] == ([] if leaves else [503])


def test_a_client_that_left_while_it_waited_moves_no_weights(digest):
    running, swapped = asyncio.Event(), []

    class Client:
        async def collective_rpc(self, method, kwargs):
            swapped.append(method)

        async def reset_prefix_cache(self):
            return True

    async def writes(scope, receive, send):
        await running.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    gate, sent = WeightGate(writes), {"base": [], digest: []}
    state = SimpleNamespace(state=SimpleNamespace(engine_client=Client()))

    async def ask(weights, left):
        messages = iter([{"type": "http.request", "body": b"{}"}])

        async def receive():
            if (message := next(messages, None)) is not None:
                return message
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent[weights].append(message)

        headers = [(b"x-workbench-weights", weights.encode())]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "app": state}
        await gate(scope | {"headers": headers}, receive, send)

    async def walk():
        left = asyncio.Event()
        first = asyncio.create_task(ask("base", asyncio.Event()))
        await asyncio.sleep(0)
        second = asyncio.create_task(ask(digest, left))
        await asyncio.sleep(0.01)
        left.set()
        await asyncio.wait_for(second, 5)
        running.set()
        await asyncio.wait_for(first, 5)
        await asyncio.sleep(0.01)

    run(walk())
    assert not swapped and not sent[digest] and sent["base"][0]["status"] == 200


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        ("Bearer secret", 200),
        ("bearer secret", 200),  # as vLLM reads it, so nothing passes by unseen
        ("BEARER secret", 200),
        ("Bearer secre", 401),
        ("Bearer  secret", 401),
        ("secret", 401),
        ("Bearer sécret", 401),
        ("", 401),
    ],
)
def test_whoever_has_the_token_passes_through_the_gate_and_nobody_else(
    monkeypatch, post, authorization, status
):
    monkeypatch.setenv("WORKBENCH_TOKEN", "secret")
    path = "/v1/completions"
    weights = {"x-workbench-weights": "a" * 64}
    assert post(path, authorization=authorization)[0] == status
    # The gate has looked at the request, which asks for weights that are not there.
    missing = post(path, authorization=authorization, **weights)
    assert missing[0] == (400 if status == 200 else 401), missing
    app, endpoints = FastAPI(), WorkbenchEndpoints()
    endpoints.attach_router(app)
    headers = {"authorization": authorization.encode("latin-1")}
    answer = TestClient(app).get("/workbench/receipts/x", headers=headers)
    assert answer.status_code == (503 if status == 200 else 401), "there is no engine behind it"


def test_a_browser_may_ask_what_it_may_send(monkeypatch, post):
    monkeypatch.setenv("WORKBENCH_TOKEN", "secret")
    # The application behind has no such method here; what matters is that it was asked.
    assert post("/v1/completions", "OPTIONS")[0] == 405
