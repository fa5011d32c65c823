"""Tokens a second of streams whose tokens are projected while they are written, and of others.

    workbench bench projections [--json] [--requests 1 8] [--tokens 128] [--rounds 5]

As many streams run together, in turn `plain`, with the `logprobs` that name each token, and with these
and `project`. Every stream must bring each value once, and all that a fetch gives afterwards; the fetch
is not timed. `cpu` is the time of the engine's processes for a token, which another program on the same
machine disturbs less; `behind` is how many tokens a value comes behind its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
from _home import own_workbench
from _results import RESULTS, publish

from vectors.steering.controls import random_direction
from vectors.types import SteeringVector
from workbench.engines.vllm.capture.found import ProjectedStream, read_projections
from workbench.engines.vllm.capture.spec import CAPTURE_ID, PROJECT
from workbench.engines.vllm.paths import CAPTURES
from workbench.engines.vllm.settings import CAPTURE
from workbench.service import Workbench

PROMPT = "Write a long letter to a friend about the number {} that you saw today."
WAYS = ("plain", "logprobs", "project")


def main() -> None:
    """Time the ways in turn, check what came, print, and append to the results file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8], help="streams at once")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of all; medians are told")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to append to")
    asked = parser.parse_args()
    os.environ[CAPTURE] = "1"
    with own_workbench() as workbench:
        streams = prepared(workbench, asked.tokens)
        for count in asked.requests:
            numbers = measured(streams, count, asked.rounds)
            publish("projections", numbers, as_json=asked.json, results=asked.results)


def prepared(workbench: Workbench, tokens: int) -> Streams:
    """Streams from the engine, which is started, along a random direction `v` in the middle."""
    model = workbench.model()
    directions = {b: random_direction(model.width, b) for b in range(model.blocks)}
    vector = SteeringVector(model.base, directions, dict.fromkeys(directions, 8.0), 0)
    workbench.library.save_vector("v", vector)
    dtype = workbench.engine().describe()["dtype"]
    return Streams(workbench.access(), tokens, model.blocks // 2, str(dtype))


class Streams:
    """Streams of one length from the engine, all at once."""

    def __init__(self, at: Mapping[str, str], tokens: int, block: int, dtype: str) -> None:
        headers = {"authorization": f"Bearer {at['token']}"}
        self._http = httpx.Client(
            base_url=at["url"],
            headers=headers,
            timeout=600,
            trust_env=False,
            limits=httpx.Limits(max_connections=None),
        )
        self._model, self.tokens, self._block, self.dtype = at["model"], tokens, block, dtype
        self.behind: list[int] = []

    def run(self, way: str, count: int) -> tuple[float, float]:
        """Seconds until all have ended, and of the engine's processors meanwhile."""
        started, busy = time.perf_counter(), _busy()
        with ThreadPoolExecutor(count) as pool:
            found = list(pool.map(lambda n: self._one(way, n), range(count)))
        seconds, busy = time.perf_counter() - started, _busy() - busy
        for name, values in found:
            if way == "project" and self._fetched(name) != values:
                raise SystemExit("What was streamed is not what a fetch gives.")
        return seconds, busy

    def _one(self, way: str, number: int) -> tuple[str, list[float]]:
        name = secrets.token_hex(12)
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": PROMPT.format(number)}],
            "max_tokens": self.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        if way != "plain":
            body["logprobs"] = True
        if way == "project":
            body["vllm_xargs"] = {PROJECT: f"v:{self._block}", CAPTURE_ID: name}
        along, written = ProjectedStream(), 0
        with self._http.stream("POST", "/v1/chat/completions", json=body) as reply:
            reply.raise_for_status()
            for line in reply.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                written += sum(
                    len((c.get("logprobs") or {}).get("content") or []) for c in chunk["choices"]
                )
                if along.take(chunk):
                    self.behind.append(written - len(along.values))
        if way == "project" and len(along.values) < self.tokens - 1:
            raise SystemExit(f"{len(along.values)} of {self.tokens - 1} projections came.")
        return name, along.values

    def _fetched(self, name: str) -> list[float]:
        return read_projections(
            self._http.get(f"{CAPTURES}/{name}").raise_for_status().content, name
        )


def _busy() -> float:
    """Processor seconds so far of all processes that this one has started."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def measured(streams: Streams, count: int, rounds: int) -> dict[str, Any]:
    """Tokens a second and processor time of each way; shares are medians of those of each round."""
    for way in WAYS:
        streams.run(way, count)
    streams.behind.clear()
    tokens = count * streams.tokens
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    busy: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in WAYS if number % 2 else reversed(WAYS):
            seconds, used = streams.run(way, count)
            speeds[way].append(round(tokens / seconds, 1))
            busy[way].append(round(1000 * used / tokens, 3))

    def share(found: dict[str, list[float]], way: str, of: str) -> float:
        ratios = [a / b for a, b in zip(found[way], found[of], strict=True)]
        return round(statistics.median(ratios), 3)

    return {
        "requests": count,
        "tokens": streams.tokens,
        "dtype": streams.dtype,
        **{f"{way}_tokens_per_second": found for way, found in speeds.items()},
        **{f"{way}_cpu_ms_per_token": found for way, found in busy.items()},
        "logprobs_of_plain": share(speeds, "logprobs", "plain"),
        "project_of_logprobs": share(speeds, "project", "logprobs"),
        "cpu_project_of_logprobs": share(busy, "project", "logprobs"),
        "behind_median": statistics.median(streams.behind),
        "behind_most": max(streams.behind),
    }


if __name__ == "__main__":
    main()
