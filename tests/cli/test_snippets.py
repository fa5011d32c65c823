"""Reference: the code that is shown asks for exactly the request that it was made from."""

from __future__ import annotations

import ast
import json
import shlex
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.engines.base import Request, Sampling
from workbench.engines.vllm.client import request_body
from workbench.engines.vllm.snippets import curl, python

PROMPTS = [
    "plain",
    'it\'s "quoted" and `run` $HOME $(rm) \\n',
    "two\nlines\r\nand\ttabs",
    "emoji \N{PARTY POPPER} and \u2028 and \u202e",
    "'; rm -rf / #",
    "@file",
    "a very long prompt " * 40,
    "{braces} %s {{x}} \"\"\" '''",
]


def request(prompt: str, **options: Any) -> Request:
    """A request with everything in it."""
    sampling = Sampling(7, 0.3, 0.9, 5)
    values: dict[str, Any] = {"steer": "kind=0.2:3/decode", "weights": "ab" * 32, **options}
    return Request(({"role": "user", "content": prompt},), sampling=sampling, **values)


def body_of(command: str) -> tuple[dict[str, Any], list[str]]:
    """What a shell would hand to curl."""
    words = shlex.split(command.replace("\\\n", " "))
    assert words[0] == "curl"
    headers = [words[i + 1] for i, word in enumerate(words) if word == "-H"]
    return json.loads(words[words.index("--data-raw") + 1]), headers


def arguments_of(script: str) -> dict[str, Any]:
    """The literal arguments of the call in the script."""
    compile(script, "snippet", "exec")
    calls = [node for node in ast.walk(ast.parse(script)) if isinstance(node, ast.Call)]
    made = next(c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "create")
    return {str(word.arg): ast.literal_eval(word.value) for word in made.keywords}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_curl_carries_the_request(prompt: str) -> None:
    asked = request(prompt)
    body, headers = body_of(curl(asked, "http://127.0.0.1:1234/", "tiny"))
    assert body == request_body(asked, "tiny", stream=False)
    assert "Authorization: Bearer $WORKBENCH_TOKEN" in headers
    assert f"x-workbench-weights: {'ab' * 32}" in headers
    assert "curl http://127.0.0.1:1234/v1/chat/completions" in curl(
        asked, "http://127.0.0.1:1234/", "tiny"
    )


@pytest.mark.parametrize("prompt", PROMPTS)
def test_python_carries_the_request(prompt: str) -> None:
    asked = request(prompt)
    found = arguments_of(python(asked, "tiny"))
    assert found.pop("extra_headers") == {"x-workbench-weights": "ab" * 32}
    expected = request_body(asked, "tiny", stream=False)
    assert {**found, **found.pop("extra_body")} | {"extra_body": None} == expected | {
        "extra_body": None
    }


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_prompt_survives(prompt: str) -> None:
    asked = request(prompt)
    assert body_of(curl(asked, "http://h", "m"))[0]["messages"][0]["content"] == prompt
    assert arguments_of(python(asked, "m"))["messages"][0]["content"] == prompt


def test_the_base_has_no_header_and_no_steering() -> None:
    asked = request("Hi", steer="", weights="base")
    assert "x-workbench-weights" not in curl(asked, "http://h", "m") + python(asked, "m")
    assert "steer" not in curl(asked, "http://h", "m") + python(asked, "m")
