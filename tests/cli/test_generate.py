"""Contract: `generate` against an engine that answers from memory."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from vectors.types import SteeringVector
from workbench.commands import generate
from workbench.commands.heat import HeatWriter
from workbench.engines.base import LoraReceipt, Projections, Receipt, Reply, Request
from workbench.models.catalog import Model
from workbench.service import Workbench

BASE = "ab" * 32


class Echo:
    """Repeats the prompt; steered if it was asked to be."""

    def stream(self, request: Request, cancel: Any) -> Iterator[str | Projections | Reply]:
        reply = self.answer(request)
        yield reply.text[:3]
        if reply.projections is not None:
            yield Projections("kind", ("You",), ())
        yield reply.text[3:]
        if reply.projections is not None:
            yield replace(reply.projections, values=reply.projections.values[:2])
        yield reply

    def generate(self, requests: Sequence[Request]) -> list[Reply]:
        return [self.answer(request) for request in requests]

    def answer(self, request: Request) -> Reply:
        text = "You said: " + str(request.messages[-1]["content"])
        receipt = Receipt(1, 7, 5, 2, 12, 12) if request.steer else None
        reply = Reply(text, 6, "stop", request.weights, receipt, 0.5)
        if not request.project:
            return reply
        return replace(
            reply, projections=Projections("kind", ("You", " said", ": [b]x"), (0.5, -1))
        )


@pytest.fixture(autouse=True)
def echo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = Model("tiny", tmp_path, BASE, 2, 4, 512, 99, 10, "TinyForCausalLM", False)
    monkeypatch.setattr(Workbench, "model", lambda self, report=None: model)
    monkeypatch.setattr(Workbench, "engine", lambda self, *args, **options: Echo())


@pytest.fixture
def vector(home: Path) -> str:
    direction_D = torch.tensor([1.0, 0, 0, 0])
    vector = SteeringVector(BASE, {1: direction_D}, {1: 3.0}, 1)
    library = Workbench(home).library
    entry = library.save_vector("kind", vector)
    library.attest(entry.digest, "verdict", {"passed": True, "break_dose": 0.3})
    return "kind"


def test_the_text_goes_to_stdout_and_the_proof_to_stderr(workbench: Any, vector: str) -> None:
    found = workbench("generate", "Hello", "Bye", "--steer", "kind=0.1")
    assert found.code == 0
    assert found.out == "You said: Hello\nYou said: Bye\n"
    assert found.err.count("steered 7 prompt (2 from the cache) and 5 decode positions") == 2
    assert "weights base" in found.err


def test_the_proof_names_a_lora_and_what_it_loses() -> None:
    lora = LoraReceipt("cd" * 32, 16, 0.25, 28, 9)
    words = generate._proof(Reply("a", 3, "stop", "lora:" + "ab" * 32, None, 0.1, lora))
    assert "LoRA of recipe cdcdcdcdcdcd, rank 16, 25.0% of the change lost" in words
    assert "weights" not in words


def test_without_a_stream_it_is_the_same(workbench: Any) -> None:
    streamed, whole = workbench("generate", "Hello"), workbench("generate", "Hello", "--no-stream")
    assert streamed.out == whole.out
    assert "not steered" in whole.err


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("COLORTERM", "truecolor"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_on_a_terminal_tokens_are_coloured_as_their_values_come(
    workbench: Any, terminal: None
) -> None:
    found = workbench("generate", "[b]x", "--project", "kind")
    assert re.sub(r"\x1b\[[0-9;]*m", "", found.out) == "You said: [b]x\n"
    # The strongest so far has the full colour, and what was not read has none.
    assert re.findall(r"48;2;([0-9;]+)m([^\x1b]*)", found.out) == [
        ("236;105;36", "You"),
        ("59;115;237", " said"),
    ]
    assert "'You' +0.50" in found.err


def test_where_no_colours_are_wanted_the_text_is_plain(
    workbench: Any, terminal: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert workbench("generate", "[b]x", "--project", "kind").out == "You said: [b]x\n"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.delenv("FORCE_COLOR")
    assert workbench("generate", "[b]x", "--project", "kind").out == "You said: [b]x\n"
    told = workbench("generate", "[b]x", "--project", "kind", "--json").json["replies"][0]
    assert told["projections"]["values"] == [0.5, -1]


@pytest.mark.parametrize(
    "pieces",
    [
        # A character of several tokens, one that is none, and a token whose text comes late.
        ["caf", "é \N{REPLACEMENT CHARACTER} a", " b", "c"],
        ["café \N{REPLACEMENT CHARACTER} a bc"],
    ],
)
def test_every_character_is_written_once_whatever_its_tokens_are(pieces: list[str]) -> None:
    tokens = ("caf", "", "é", "", " ", " a", " bc", "<|end|>")
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="truecolor")
    writer, seen = HeatWriter(console), []
    for known, piece in enumerate(pieces):
        writer.add(piece)
        writer.colour(Projections("v", tokens, (0.5,) * (2 * known + 5)))
        seen.append(re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()))
    writer.end()
    assert re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()) == "".join(pieces)
    assert all("".join(pieces).startswith(text) for text in seen) and seen[0]


def test_json_has_replies_and_warnings(workbench: Any, vector: str) -> None:
    found = workbench("generate", "Hello", "--steer", "kind=0.35", "--json")
    assert found.json["replies"][0]["text"] == "You said: Hello"
    assert found.json["replies"][0]["receipt"]["decode"] == 5
    assert "broke at dose 0.3" in found.json["warnings"][0]
    assert "broke at dose 0.3" in workbench("generate", "Hello", "--steer", "kind=0.35").err


def test_a_dash_reads_stdin(workbench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("héllo".encode())))
    assert workbench("generate", "-").out == "You said: héllo\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    assert workbench("generate", "-").code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        [" "],
        ["Hi", "--temperature", "3"],
        ["Hi", "--temperature", "nan"],
        ["Hi", "--max-tokens", "0"],
        ["Hi", "--steer", "nothing=0.1"],
        ["Hi", "--steer", "kind=inf"],
        ["Hi", "--steer", "kind=0.1:7"],
        ["Hi", "--steer", "kind=0.1/sideways"],
        ["Hi", "--with", "nothing=1"],
        ["Hi", "--with", "nothing=1", "--as", "lora"],
        ["Hi", "--as", "lora"],
        ["Hi", "--rank", "8"],
        ["Hi", "--with", "kind=1", "--error", "0.1"],
    ],
    ids=" ".join,
)
def test_bad_requests_are_told_before_any_work(
    arguments: list[str], workbench: Any, vector: str
) -> None:
    told = workbench("generate", *arguments)
    assert (told.code, told.out) == (2, "")
    assert told.err.count("\n") == 1


def test_code_instead_of_an_answer(workbench: Any, vector: str) -> None:
    found = workbench("generate", "It's", "--steer", "kind=0.1", "--curl", "--python")
    assert found.out.startswith("curl http://127.0.0.1:")
    assert "from openai import OpenAI" in found.out
    assert "You said" not in found.out
    only = workbench("generate", "It's", "--curl", "--json").json["code"][0]
    assert list(only) == ["curl"]
