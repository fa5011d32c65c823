"""What a client sends, changed on its way to vLLM."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from workbench.engines.vllm.capture.spec import FOLLOW_ID, PROJECT
from workbench.engines.vllm.spec import STEER, as_text

__all__ = ["Receive", "changed", "extra_of", "followed_as", "for_lora", "with_steer_as_text"]

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

_OBJECT = re.compile(rf'"{STEER}"\s*:\s*\{{'.encode())
_ODD = (ValueError, TypeError, KeyError, RecursionError)
"""What bodies raise that vLLM refuses in words of its own."""
XARGS = "vllm_xargs"


async def changed(receive: Receive, *changes: Callable[[bytes], bytes]) -> Receive | None:
    """The request that `receive` brings, its body changed; None where the client left half-way."""
    parts: list[bytes] = []
    message: MutableMapping[str, Any] = {"more_body": True}
    while message.get("more_body"):
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
    body = b"".join(parts)
    for change in changes:
        body = change(body)
    sent = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def extra_of(body: bytes) -> dict[str, Any]:
    """What is ours in a body; nothing where vLLM will refuse it."""
    try:
        extra = json.loads(body)[XARGS]
    except _ODD:
        return {}
    return extra if isinstance(extra, dict) else {}


def followed_as(body: bytes, name: str) -> bytes:
    """Give a request for projections a name that no other has, whatever id its client chose."""
    if PROJECT.encode() not in body or PROJECT not in (extra := extra_of(body)):
        return body
    return json.dumps({**json.loads(body), XARGS: {**extra, FOLLOW_ID: name}}).encode()


def for_lora(body: bytes, model: str) -> bytes:
    """Ask for another model: vLLM takes a request's LoRA from it, so header and body agree."""
    try:
        return json.dumps({**json.loads(body), "model": model}).encode()
    except _ODD:
        return body


def with_steer_as_text(body: bytes) -> bytes:
    """The JSON form of `steer` as text, which alone vLLM lets through, where it came as an object."""
    if not _OBJECT.search(body):
        return body
    try:
        asked = json.loads(body)
        extra = asked[XARGS]
        asked[XARGS] = {**extra, STEER: as_text(extra[STEER])}
        return json.dumps(asked).encode()
    except _ODD:
        return body
