"""One weight state at a time: requests say which weights they want and wait for their turn.

A request names a weight state by the header `x-workbench-weights` (a recipe digest, or nothing for
the base). When its turn has come (see `turns`), the weights are swapped in place (`reload_weights`) and the
prefix cache is emptied. Every reply names, in the same header, the weights that made it. Routes of vLLM that
would generate past all this, or move weights themselves, are refused.

A state `lora:<digest>` is the base with a LoRA for this request alone (see `lora`), so it runs together
with requests of the base and of other LoRAs.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers

from vectors.errors import InputError
from workbench.engines.base import BASE_WEIGHTS, LORA
from workbench.engines.vllm import access, bodies, lora
from workbench.engines.vllm.capture.stream import UNFINISHED, Streams
from workbench.engines.vllm.endpoints import WorkbenchEndpoints
from workbench.engines.vllm.paths import OURS
from workbench.engines.vllm.settings import LORAS
from workbench.engines.vllm.turns import Turns

__all__ = ["HEADER", "WeightGate"]

HEADER = "x-workbench-weights"
MESSAGES = "/v1/messages"
GUARDED = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    MESSAGES,
    "/inference/v1/generate",
)
"""Routes that generate, and hand what steers to the engine."""
HARMLESS = (
    "/tokenize",
    "/detokenize",
    "/ping",
    "/abort_requests",
    "/inference/v1/abort_requests",
    "/reset_prefix_cache",
    "/start_profile",
    "/stop_profile",
)
"""What else may be posted, because it neither generates nor moves weights."""
READING = ("GET", "HEAD", "OPTIONS")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class _Refused(Exception):
    """A request that ends with this status and these words."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


class WeightGate:
    """ASGI middleware for vLLM's server (`--middleware`)."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app
        self.weights = Path(os.environ["WORKBENCH_WEIGHTS"])
        self.base = os.environ["WORKBENCH_CHECKPOINT"]
        self.client: Any = None
        self.guarded = _guarded()
        self.turns = Turns(self._swap)
        loras = os.environ.get(LORAS, str(self.weights.parent / "loras"))
        self.loras = lora.Loras(Path(loras), os.environ.get("WORKBENCH_BASE", ""))
        self.routes = WorkbenchEndpoints()
        self.streams = Streams()
        self.own: Any = None
        if find_spec("vllm.plugins.endpoint_plugins") is None:
            # Older vLLM has no plugins for routes, so ours are answered here.
            self.own = FastAPI()
            self.routes.attach_router(self.own)

    async def _swap(self, wanted: str) -> None:
        folder = self.base if wanted == BASE_WEIGHTS else str(self.weights / wanted)
        await self.client.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        if not await self.client.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be emptied after the weights changed")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})[UNFINISHED] = self.streams.unfinished
        if self.own is not None and scope["type"] == "http" and scope["path"].startswith(OURS):
            self.routes.engine = scope["app"].state.engine_client
            await self.own(scope, receive, send)
            return
        if scope["type"] != "http" or not scope["path"].startswith(self.guarded):
            if _passes_by(scope):
                words = (
                    f"This server does not answer {scope['method']} {scope['path'][:80]}, which knows "
                    f"nothing of steering and weights; use {', '.join(self.guarded)}."
                )
                await _answer(send, 400, words)
                return
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        # Whoever may not use the server may not move its weights either. Browsers ask first, without it.
        if scope["method"] == "OPTIONS":
            await self.app(scope, receive, send)
            return
        if not access.admitted(headers.get("authorization", "")):
            await _answer(send, 401, access.UNKNOWN)
            return
        wanted = headers.get(HEADER, BASE_WEIGHTS)
        if refusal := self._refuse(wanted):
            await _answer(send, 400, refusal)
            return
        self.client = scope["app"].state.engine_client
        digest = wanted.removeprefix(LORA) if wanted.startswith(LORA) else ""
        changes: list[Callable[[bytes], bytes]] = [
            bodies.with_steer_as_text,
            partial(bodies.followed_as, name=secrets.token_hex(16)),
        ]
        if digest:
            changes.append(partial(bodies.for_lora, model=digest))
        whole = await bodies.changed(receive, *changes)
        if whole is None:
            return  # nobody waits, so no weights move
        try:
            # The body is here, so that nothing but the client's departure can come.
            entered = await self.turns.enter_unless(receive, BASE_WEIGHTS if digest else wanted)
        except Exception as error:
            await _answer(send, 503, f"The weights {wanted[:12]} could not be loaded: {error}")
            return
        if not entered:
            return
        names = [(HEADER.encode(), wanted.encode())]

        async def name_weights(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *names]
            await send(message)

        reply = self.streams.follow(self.client, scope["path"], whole, name_weights)
        try:
            if digest:
                names.append(await self._load_lora(digest, scope))
            await self.app(scope, reply.receive, reply.send)
        except _Refused as refused:
            await _answer(send, refused.status, str(refused))
        finally:
            self.streams.leave(reply)
            self.turns.leave()

    async def _load_lora(self, digest: str, scope: Scope) -> tuple[bytes, bytes]:
        """Have the LoRA ready, and give the header that says which it is and what it loses."""
        models = scope["app"].state.openai_serving_models
        try:
            receipt = await self.loras.ready(digest, self.client, models)
        except InputError as error:
            raise _Refused(400, str(error)) from error
        except Exception as error:
            raise _Refused(503, f"The LoRA {digest[:12]} could not be loaded: {error}") from error
        return lora.HEADER.encode(), json.dumps(asdict(receipt)).encode()

    def _refuse(self, wanted: str) -> str:
        if wanted == BASE_WEIGHTS:
            return ""
        if not re.fullmatch(rf"({LORA})?[0-9a-f]{{64}}", wanted):
            return (
                f"{HEADER} must be 'base', a recipe digest of 64 hex digits, or '{LORA}' and the "
                "digest of a LoRA."
            )
        if wanted.startswith(LORA):
            return ""  # looked at when it is loaded
        if not (self.weights / wanted / "config.json").is_file():
            return f"The weights {wanted[:12]} are not materialised; make them with the workbench first."
        return ""


def _guarded() -> tuple[str, ...]:
    """Those of `GUARDED` that hand on what steers in this vLLM; 0.25 drops it from messages."""
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest  # noqa: PLC0415

    if "vllm_xargs" in AnthropicMessagesRequest.model_fields:
        return GUARDED
    return tuple(path for path in GUARDED if path != MESSAGES)


def _passes_by(scope: Scope) -> bool:
    """Whether it may generate unsteered, on whatever weights there are, or move them."""
    if scope["type"] != "http" or scope["method"] in READING:
        return False
    return scope["path"] not in HARMLESS and not scope["path"].startswith(OURS)


async def _answer(send: Send, status: int, words: str) -> None:
    body = json.dumps(
        {"error": {"message": words, "type": "BadRequestError", "code": status}}
    ).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
