"""Base, steered and trained on the same prompts: the texts side by side, and the numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from workbench.engines.base import BASE_WEIGHTS, Request, Sampling
from workbench.verify.measure import Bench

__all__ = ["Comparison", "compare", "recovered_of"]

Report = Callable[[float, str], None]


@dataclass(frozen=True)
class Comparison:
    """What was measured; margins and KL in nats, `recovered` as a share."""

    rows: list[dict[str, str]]
    margin: dict[str, float]
    kl: dict[str, float]
    recovered: float | None
    weights: dict[str, str]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """For storing and showing."""
        return asdict(self)


def recovered_of(base: float, steered: float, trained: float) -> float | None:
    """Return `(trained - base) / (steered - base)`, not clipped; None where steering did nothing."""
    return None if abs(steered - base) < 1e-9 else (trained - base) / (steered - base)


def compare(
    bench: Bench,
    *,
    steer: str,
    trained: str,
    prompts: Sequence[str],
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    report: Report = lambda share, words: None,
) -> Comparison:
    """Measure and write out base, `steer`, and the weight state `trained`, through the engine."""
    started = time.monotonic()
    columns = {
        "base": ("", BASE_WEIGHTS),
        "steered": (steer, BASE_WEIGHTS),
        "trained": ("", trained),
    }
    margin: dict[str, float] = {}
    kl: dict[str, float] = {}
    texts: dict[str, list[str]] = {}
    weights: dict[str, str] = {}
    # All work on the base's weights is done before the swap.
    for number, (column, (steering, state)) in enumerate(columns.items()):
        report(number / 3, f"measuring the {column} model")
        margins = bench.margins(steer=steering, weights=state)
        margin[column] = sum(margins) / len(margins)
        if column != "base":
            kl[column] = bench.side_effects(steer=steering, weights=state).kl
        report((number + 0.6) / 3, f"writing with the {column} model")
        replies = bench.engine.generate(
            [
                Request(
                    ({"role": "user", "content": prompt},),
                    steering,
                    state,
                    Sampling(max_tokens, temperature, 1.0, seed),
                )
                for prompt in prompts
            ],
            bench.cancelled,
        )
        texts[column] = [reply.text for reply in replies]
        weights[column] = replies[0].weights if replies else state
    rows = [
        {"prompt": prompt, **{column: texts[column][i] for column in columns}}
        for i, prompt in enumerate(prompts)
    ]
    found = recovered_of(margin["base"], margin["steered"], margin["trained"])
    return Comparison(rows, margin, kl, found, weights, time.monotonic() - started)
