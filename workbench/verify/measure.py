"""What is measured of a weight state under steering: margin, side effects, text. All by an engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

from vectors.steering.statistics import repetition, table_kl
from workbench.data.contrast import ContrastPair
from workbench.data.templates import Sample, sample
from workbench.engines.base import BASE_WEIGHTS, Engine, Request, Sampling, TokenTable

__all__ = ["Bench", "SideEffects", "read_prompts"]

TABLE = 200
Report = Callable[[float, str], None]


def read_prompts(name: str) -> list[dict[str, Any]]:
    """The built-in prompts `training`, `replay` or `neutral`."""
    text = files("workbench.data").joinpath(f"builtin/prompts-{name}.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


@dataclass(frozen=True)
class SideEffects:
    """Token KL to the base in nats on neutral text (mean and 95th percentile)."""

    kl: float
    kl_p95: float


@dataclass
class Bench:
    """One engine, one tokenizer, one set of held-out pairs and neutral texts to measure on."""

    engine: Engine
    tokenizer: Any
    pairs: Sequence[ContrastPair]
    neutral: Sequence[dict[str, Any]]
    cancelled: Callable[[], bool] = lambda: False

    def margins(
        self, *, steer: str = "", weights: str = BASE_WEIGHTS, system: str = ""
    ) -> list[float]:
        """Per pair, log p(positive) - log p(negative), summed over the completion's tokens."""
        sides = self._sides(system)
        scored = self.engine.score(
            [(s.context, s.completion) for s in sides],
            steer=steer,
            weights=weights,
            cancel=self.cancelled,
        )
        return [a - b for a, b in zip(scored[::2], scored[1::2], strict=True)]

    def _sides(self, system: str = "") -> list[Sample]:
        return [
            sample(self.tokenizer, p.prompt, text, system=system, window=self.engine.window)
            for p in self.pairs
            for text in (p.positive, p.negative)
        ]

    def check(self) -> None:
        """Tell what the engine cannot measure before long work is done for it.

        Raises:
            PromptTooLong: a pair or a neutral text that its window does not hold.
        """
        self._sides()
        _ = self.neutral_samples

    def side_effects(self, *, steer: str = "", weights: str = BASE_WEIGHTS) -> SideEffects:
        """KL(base || this) on the neutral texts."""
        tables = self._tables(steer, weights)
        values = sorted(
            table_kl(p, q)
            for base_rows, rows in zip(self.base_tables, tables, strict=True)
            for p, q in zip(base_rows, rows, strict=True)
        )
        return SideEffects(sum(values) / len(values), values[int(0.95 * (len(values) - 1))])

    @cached_property
    def base_tables(self) -> list[TokenTable]:
        """The base's own next-token tables on the neutral texts."""
        return self._tables("", BASE_WEIGHTS)

    @cached_property
    def neutral_samples(self) -> list[Sample]:
        """The neutral texts as tokens."""
        return [
            sample(self.tokenizer, row["prompt"], row["text"], window=self.engine.window)
            for row in self.neutral
        ]

    def _tables(self, steer: str, weights: str) -> list[TokenTable]:
        return self.engine.tables(
            [(s.context, s.completion) for s in self.neutral_samples],
            top=TABLE,
            steer=steer,
            weights=weights,
            cancel=self.cancelled,
        )

    def texts(
        self,
        prompts: Sequence[str],
        *,
        steer: str = "",
        weights: str = BASE_WEIGHTS,
        max_tokens: int = 48,
    ) -> tuple[list[str], float]:
        """Greedy replies to the prompts, and their mean share of repeated 3-grams."""
        requests = [
            Request(
                ({"role": "user", "content": prompt},),
                steer,
                weights,
                Sampling(max_tokens=max_tokens, temperature=0.0),
            )
            for prompt in prompts
        ]
        replies = [reply.text for reply in self.engine.generate(requests, self.cancelled)]
        return replies, sum(repetition(text) for text in replies) / max(len(replies), 1)
