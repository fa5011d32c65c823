"""The server's part of projecting while a reply is written: values ride on the chunks that pass.

A streamed chat or completion that asks for `project` stays the stream that vLLM makes, event for event;
some of its chunks get one key more, `workbench`. The workers are asked once for all such replies, never
twice within `PACE`, and once more for each reply that ends, before its last chunk goes out.

What is captured under an id is complete when its reply is, so the ids of replies that are being written
are known here, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from workbench.engines.vllm.bodies import extra_of
from workbench.engines.vllm.capture.spec import CAPTURE_ID, FOLLOW_ID, PROJECT

__all__ = ["PACE", "UNFINISHED", "Following", "Streams"]

log = logging.getLogger(__name__)

PACE = 0.1
"""Seconds between two calls to the workers: as often as the page draws."""
KEY = "workbench"
UNFINISHED = "workbench_unfinished"
"""In the state of a request to the server: the capture ids of replies that are being written."""
STREAMED = ("/v1/chat/completions", "/v1/completions")
UNKNOWN = "the engine knows nothing of it; fetch it by its id, or ask again"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Streams:
    """All replies of one server that are being written and read."""

    def __init__(self) -> None:
        self.unfinished: Counter[str] = Counter()
        self._following: set[Following] = set()
        self._ended: list[Following] = []
        self._asking: asyncio.Task[None] | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self._asked = 0.0

    def follow(self, client: Any, path: str, receive: Receive, send: Send) -> Following:
        """The same request with its reply's values added; pair with `leave`."""
        return Following(self, client, path in STREAMED, receive, send)

    def read(self, reply: Following) -> None:
        """A request that captures is about to run."""
        if reply.capture_id:
            self.unfinished[reply.capture_id] += 1

    def finish(self, reply: Following) -> None:
        """Its reply is written; may be said again."""
        if reply.capture_id:
            self.unfinished -= Counter((reply.capture_id,))
            reply.capture_id = ""

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
        since = {reply.name: reply.known for reply in replies}
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
                    reply.take(*found[reply.name])
            for reply in ended:
                reply.problem = reply.problem if reply.name in found else UNKNOWN
                reply.complete.set()

    def leave(self, reply: Following) -> None:
        """A request is done; what its client does not wait for is dropped in the workers, too."""
        self.finish(reply)
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
        self.capture_id = ""
        self.known = 0
        self.problem = ""
        self.complete = asyncio.Event()
        self._streams = streams
        self._streamed = streamed
        self._receive = receive
        self._send = send
        self._new: list[float] = []

    async def receive(self) -> Message:
        """What the client sends, in one message, looked at as it passes."""
        message = await self._receive()
        body: bytes = message.get("body", b"")
        if CAPTURE_ID.encode() in body:
            extra = extra_of(body)
            self.capture_id = str(extra.get(CAPTURE_ID, ""))
            if self._streamed and PROJECT in extra:
                self.name = str(extra.get(FOLLOW_ID, ""))
            self._streams.read(self)
        return message

    async def send(self, message: Message) -> None:
        """What vLLM answers, with the values that are known by then."""
        if message["type"] == "http.response.start":
            if not _is_events(message):
                self.name = ""
            if self.name:
                self._streams.begin(self)
        elif self.name and message.get("body"):
            message = {**message, "body": await self._told(bytes(message["body"]))}
        # Before the client hears of it, for then it may fetch.
        if message["type"] == "http.response.body" and _is_last(message):
            self._streams.finish(self)
        await self._send(message)

    def take(self, values: list[float], problem: str) -> None:
        """The workers' answer: the values behind those that are known."""
        self._new += values
        self.known += len(values)
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


def _is_last(message: Message) -> bool:
    """Whether a reply is whole with this; of a stream, when its text is."""
    body: bytes = message.get("body", b"")
    return not message.get("more_body") or b'"finish_reason":"' in body or b"[DONE]" in body


def _chunk(event: bytes) -> dict[str, Any] | None:
    """A chunk of OpenAI's; None is anything else, such as `[DONE]` or an error."""
    if not event.startswith(b"data: {") or not event.endswith(b"\n\n"):
        return None
    try:
        chunk = json.loads(event.removeprefix(b"data: "))
    except ValueError:
        return None
    return chunk if isinstance(chunk.get("choices"), list) else None
