"""The server's part of projecting while a reply is written: values ride on the chunks that pass.

A streamed chat or completion that asks for `project` stays the stream that vLLM makes, event for event;
some of its chunks get one key more, `workbench`. The workers are asked once for all such replies, never
twice within `PACE`, and once more for each reply that ends, before its last chunk goes out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from workbench.engines.vllm.capture.spec import CAPTURE_ID, PROJECT

__all__ = ["PACE", "Following", "Streams"]

log = logging.getLogger(__name__)

PACE = 0.1
"""Seconds between two calls to the workers: as often as the page draws."""
KEY = "workbench"
STREAMED = ("/v1/chat/completions", "/v1/completions")
UNKNOWN = "the engine knows nothing of it; fetch it by its id, or ask again"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Streams:
    """All replies of one server that are being written and projected."""

    def __init__(self) -> None:
        self._following: set[Following] = set()
        self._ended: list[Following] = []
        self._asking: asyncio.Task[None] | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self._asked = 0.0

    def follow(self, client: Any, path: str, receive: Receive, send: Send) -> Following:
        """The same request with its reply's values added; pair with `leave`."""
        return Following(self, client, path in STREAMED, receive, send)

    def begin(self, reply: Following) -> None:
        """A reply begins to be written."""
        self._following.add(reply)

    def soon(self, reply: Following) -> None:
        """Ask what is new, unless that was done a moment ago; nobody waits for the answer."""
        if self._asking is None and time.monotonic() - self._asked >= PACE:
            self._asking = asyncio.create_task(self._ask(reply.client))

    async def all(self, reply: Following) -> None:
        """Return when all values of a reply that has ended are there."""
        self._ended.append(reply)
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask(reply.client))
        await reply.complete.wait()

    async def _ask(self, client: Any) -> None:
        try:
            while True:
                ended, self._ended = self._ended, []
                await self._round(client, ended)
                if not self._ended:
                    return
        finally:
            self._asking = None

    async def _round(self, client: Any, ended: list[Following]) -> None:
        """One call, for every reply; it ends well, whatever becomes of the call."""
        self._asked = time.monotonic()
        replies = list(self._following)
        since: dict[str, int] = {}
        for reply in replies:
            since[reply.name] = min(reply.known, since.get(reply.name, reply.known))
        found: dict[str, tuple[list[float], str]] = {}
        try:
            names = [reply.name for reply in ended]
            answers = await client.collective_rpc("workbench_projections", args=(since, names))
            found = answers[0]
        except Exception:
            # Who waits is told that it is unknown; an engine that is gone says so in the stream.
            log.exception("the workers were not asked for projections")
        finally:
            for reply in replies:
                if reply.name in found:
                    reply.take(since[reply.name], *found[reply.name])
            for reply in ended:
                reply.problem = reply.problem if reply.name in found else UNKNOWN
                reply.complete.set()

    def leave(self, reply: Following) -> None:
        """A request is done; what its client does not wait for is dropped in the workers, too."""
        if reply not in self._following:
            return
        self._following.discard(reply)
        if not reply.complete.is_set():
            task = asyncio.create_task(_forget(reply))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)


async def _forget(reply: Following) -> None:
    with contextlib.suppress(Exception):  # an engine that is gone has forgotten it
        await reply.client.collective_rpc("workbench_forget", args=([reply.name],))


class Following:
    """One request: `receive` and `send` stand between vLLM and the server."""

    def __init__(
        self, streams: Streams, client: Any, streamed: bool, receive: Receive, send: Send
    ) -> None:
        self.client = client
        self.name = ""
        self.known = 0
        self.problem = ""
        self.complete = asyncio.Event()
        self._streams = streams
        self._streamed = streamed
        self._receive = receive
        self._send = send
        self._body: list[bytes] = []
        self._new: list[float] = []

    async def receive(self) -> Message:
        """What the client sends, looked at as it passes."""
        message = await self._receive()
        if self._streamed and message["type"] == "http.request":
            self._body.append(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        """What vLLM answers, with the values that are known by then."""
        if message["type"] == "http.response.start":
            body, self._body = b"".join(self._body), []
            if _is_events(message):
                self.name = _asked_for(body)
            if self.name:
                self._streams.begin(self)
        elif self.name and message.get("body"):
            message = {**message, "body": await self._told(bytes(message["body"]))}
        await self._send(message)

    def take(self, first: int, values: list[float], problem: str) -> None:
        """The workers' answer: values from number `first` on."""
        new = values[self.known - first :]
        self._new += new
        self.known += len(new)
        self.problem = problem

    async def _told(self, event: bytes) -> bytes:
        chunk = _chunk(event)
        if chunk is None:
            return event
        ends = any(choice.get("finish_reason") for choice in chunk["choices"])
        if ends:
            await self._streams.all(self)
        elif chunk["choices"]:
            self._streams.soon(self)
        if not self._new and not (ends and self.problem):
            return event
        values, self._new = self._new, []
        told: dict[str, Any] = {
            "first": self.known - len(values),
            # Where a dose broke the model; JSON has no word for it.
            "values": [value if math.isfinite(value) else None for value in values],
        }
        if ends and self.problem:
            told["problem"] = self.problem
        chunk[KEY] = {"projections": told}
        return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def _is_events(start: Message) -> bool:
    for name, value in start.get("headers", []):
        if name.lower() == b"content-type":
            return start["status"] == 200 and value.startswith(b"text/event-stream")
    return False


def _asked_for(body: bytes) -> str:
    """Under which id a request wants projections; nothing where it does not."""
    if PROJECT.encode() not in body:
        return ""
    try:
        extra = json.loads(body).get("vllm_xargs") or {}
        return str(extra[CAPTURE_ID]) if PROJECT in extra else ""
    except (ValueError, AttributeError, TypeError, KeyError):
        return ""


def _chunk(event: bytes) -> dict[str, Any] | None:
    """A chunk of OpenAI's; None is anything else, such as `[DONE]` or an error."""
    if not event.startswith(b"data: {") or not event.endswith(b"\n\n"):
        return None
    try:
        chunk = json.loads(event.removeprefix(b"data: "))
    except ValueError:
        return None
    return chunk if isinstance(chunk.get("choices"), list) else None
