"""Tokens a second of steered against unsteered requests, in the engine of the model in use.

    workbench bench steering [--json] [--requests 8] [--tokens 64] [--rounds 5]

As many requests run together as vectors exist, each steered at every block by a vector of its own and
in the same round unsteered, the order alternating. First it is verified that each steered request of a
mixed batch gives what it gives alone, other than unsteered, and that its receipt counts every position.
The library of vectors is a temporary one; on a CUDA device `_gpu_steering_cost.py` measures the
decode graph itself.
"""

from __future__ import annotations

import argparse
import secrets
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from _home import own_workbench
from _results import RESULTS, publish

from vectors.steering.controls import random_direction
from vectors.types import SteeringVector
from workbench.engines.vllm.paths import RECEIPTS
from workbench.engines.vllm.spec import STEER, STEER_ID
from workbench.service import Workbench

PROMPT = "Write a long letter to a friend about the {} that you saw today."
THINGS = ("river", "market", "storm", "garden", "museum", "train", "mountain", "play")
DOSE = 0.4
"""Of a random direction at each block; enough to change every reply, whatever it says."""


def main() -> None:
    """Verify, time, print, and append to the results file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--requests", type=int, default=8, help="requests, and vectors, at once")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each reply")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of both; medians are told")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to append to")
    asked = parser.parse_args()
    with own_workbench() as workbench:
        make_vectors(workbench, asked.requests)
        workbench.engine()
        numbers = measured(Client(workbench, asked.tokens), asked.requests, asked.rounds)
    publish("steering", numbers, as_json=asked.json, results=asked.results)


def make_vectors(workbench: Workbench, count: int) -> None:
    """Keep random directions at every block as `v0`, `v1` and so on."""
    model = workbench.model()
    for number in range(count):
        directions = {
            block: random_direction(model.width, 1000 * number + block)
            for block in range(model.blocks)
        }
        vector = SteeringVector(model.base, directions, dict.fromkeys(directions, 8.0), 0)
        workbench.library.save_vector(f"v{number}", vector)


class Client:
    """Sends requests of one length to the engine, all at once."""

    def __init__(self, workbench: Workbench, tokens: int) -> None:
        at = workbench.access()
        headers = {"authorization": f"Bearer {at['token']}"}
        self._http = httpx.Client(base_url=at["url"], headers=headers, timeout=600, trust_env=False)
        self._model, self.tokens = at["model"], tokens
        self.last_block = workbench.model().blocks - 1

    def ask(self, steers: Sequence[str]) -> list[str]:
        """The replies; an empty text steers nothing."""
        with ThreadPoolExecutor(len(steers)) as pool:
            return list(pool.map(self._one, range(len(steers)), steers))

    def alone(self, number: int, steer: str) -> str:
        """The same request with nothing beside it; fails where a position was not steered."""
        receipt = secrets.token_hex(12)
        reply = self._one(number, steer, receipt)
        proof = self._http.get(f"{RECEIPTS}/{receipt}").raise_for_status().json()
        # Every reply has its prompt and all but the last of its own tokens as positions.
        if proof["problem"] or proof["decode"] < self.tokens - 1 or proof["prompt"] < 1:
            raise SystemExit(f"A request was not steered at every position: {proof}")
        return reply

    def _one(self, number: int, steer: str, receipt: str = "") -> str:
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": PROMPT.format(THINGS[number % len(THINGS)]),
            "max_tokens": self.tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        if steer:
            body["vllm_xargs"] = {STEER: steer, STEER_ID: receipt or secrets.token_hex(12)}
        answer = self._http.post("/v1/completions", json=body).raise_for_status().json()
        return answer["choices"][0]["text"]


def measured(client: Client, requests: int, rounds: int) -> dict[str, Any]:
    """Verify, then time both ways; rates in tokens a second."""
    steered = [f"v{n}={DOSE}:0-{client.last_block}" for n in range(requests)]
    unsteered = [""] * requests
    plain = client.ask(unsteered)
    # Rounding differs with what else is in a batch, and one token decides all that follow.
    alone = [client.alone(n, steer) for n, steer in enumerate(steered)]
    mixed = client.ask([s if n % 2 else "" for n, s in enumerate(steered)])
    right = [mixed[n] == (alone if n % 2 else plain)[n] for n in range(requests)]
    changed = [a != p for a, p in zip(alone, plain, strict=True)]
    if sum(right) < 0.75 * requests or not all(changed):
        raise SystemExit(f"Steering is not right: as alone {right}, changed {changed}")
    rates: dict[str, list[float]] = {"unsteered": [], "steered": []}
    ways = [("unsteered", unsteered), ("steered", steered)]
    for number in range(rounds):
        for name, steers in ways if number % 2 else reversed(ways):
            started = time.perf_counter()
            client.ask(steers)
            seconds = time.perf_counter() - started
            rates[name].append(requests * client.tokens / seconds)
    ratios = [s / u for s, u in zip(rates["steered"], rates["unsteered"], strict=True)]
    return {
        "requests": requests,
        "vectors": requests,
        "as_alone": sum(right),
        **{f"{name}_tokens_s": [round(rate, 1) for rate in found] for name, found in rates.items()},
        "ratio": statistics.median(ratios),
        "ratio_of_best": max(rates["steered"]) / max(rates["unsteered"]),
    }


if __name__ == "__main__":
    main()
