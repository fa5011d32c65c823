"""The same request as something to paste: a curl command, and a Python script."""

from __future__ import annotations

import json
import shlex
from pprint import pformat

from workbench.engines.base import BASE_WEIGHTS, Request
from workbench.engines.vllm.client import request_body

__all__ = ["curl", "python"]

WEIGHTS = "x-workbench-weights"


def curl(request: Request, url: str, model: str) -> str:
    """A command for a POSIX shell that holds the engine's token in `WORKBENCH_TOKEN`."""
    body = json.dumps(request_body(request, model, stream=False), ensure_ascii=False, indent=2)
    lines = [
        f"curl {shlex.quote(url.rstrip('/') + '/v1/chat/completions')}",
        # Double quotes, so that the shell fills the token in.
        '-H "Authorization: Bearer $WORKBENCH_TOKEN"',
        "-H 'Content-Type: application/json'",
    ]
    if request.weights != BASE_WEIGHTS:
        lines.append(f"-H {shlex.quote(f'{WEIGHTS}: {request.weights}')}")
    # --data-raw, unlike --data, does not take a leading @ for a file.
    lines.append(f"--data-raw {shlex.quote(body)}")
    return " \\\n  ".join(lines)


def python(request: Request, model: str, url: str = "http://127.0.0.1:8000") -> str:
    """A script for the `openai` package, which reads the token from `WORKBENCH_TOKEN`."""
    body = request_body(request, model, stream=False)
    steering = body.pop("vllm_xargs", None)
    arguments = dict(body)
    if steering is not None:
        arguments["extra_body"] = {"vllm_xargs": steering}
    if request.weights != BASE_WEIGHTS:
        arguments["extra_headers"] = {WEIGHTS: request.weights}
    address = url.rstrip("/") + "/v1"
    lines = [
        "import os",
        "",
        "from openai import OpenAI",
        "",
        f'client = OpenAI(base_url={address!r}, api_key=os.environ["WORKBENCH_TOKEN"])',
        "reply = client.chat.completions.create(",
        *(f"    {name}={_literal(value)}," for name, value in arguments.items()),
        ")",
        "print(reply.choices[0].message.content)",
    ]
    return "\n".join(lines) + "\n"


def _literal(value: object) -> str:
    return pformat(value, width=88, sort_dicts=False).replace("\n", "\n    ")
