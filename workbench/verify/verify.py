"""Is the direction right? Dose sweep, controls, side effects, and the verdict by fixed rules."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vectors.steering.controls import random_like
from vectors.steering.statistics import bootstrap_mean, permutation_p
from vectors.store import Library
from vectors.types import SteeringVector
from workbench.verify.measure import Bench

__all__ = ["DOSES", "KL_BUDGET", "Verdict", "verify"]

DOSES = (-0.2, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
CONTROL_PAIRS = 12
"""Controls are many, so they and the vector are compared on the first pairs alone."""
KL_BUDGET = 0.5
"""Nats a token on neutral text: what a verified dose may change of text it is not about."""
BROKEN_REPETITION = 0.35
"""Share of repeated 3-grams in greedy text above which it counts as broken."""
FEWEST_CONTROLS = 19
SAMPLES = 4

Report = Callable[[float, str], None]
Note = Callable[..., None]


@dataclass(frozen=True)
class Dose:
    """Everything measured at one dose."""

    dose: float
    margin: float
    low: float
    high: float
    change: float
    change_low: float
    change_high: float
    kl: float
    kl_p95: float
    repetition: float
    sample: str


@dataclass(frozen=True)
class Rule:
    """One rule of the verdict, and whether it is kept."""

    rule: str
    passed: bool
    words: str


@dataclass(frozen=True)
class Verdict:
    """The stored answer to "is this direction right?"."""

    vector: str
    digest: str
    passed: bool
    reasons: tuple[Rule, ...]
    working_dose: float
    break_dose: float | None
    base_margin: float
    doses: tuple[Dose, ...]
    random: tuple[dict[str, float], ...]
    random_dose: float
    p_value: float
    opposite_change: float
    prompt: dict[str, Any]
    kl_budget: float
    pairs: int
    engine: dict[str, Any]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As stored beside the vector, and as the page's charts read it."""
        return asdict(self)


def verify(
    bench: Bench,
    library: Library,
    vector: SteeringVector,
    *,
    name: str,
    digest: str,
    instruction: str,
    doses: Sequence[float] = DOSES,
    controls: int = FEWEST_CONTROLS,
    seed: int = 0,
    kl_budget: float = KL_BUDGET,
    report: Report = lambda share, words: None,
    note: Note = lambda **values: None,
) -> Verdict:
    """Measure the vector at its best block on held-out pairs, through the engine.

    The verdict passes if, at the working dose, (1) the bootstrap interval of the margin's change
    excludes 0, (2) the opposite dose moves the margin the other way, (3) the change beats that of
    all of at least 19 random directions of equal norm, and (4) token KL on neutral text is within
    its budget. The working dose is the largest measured one within the budget whose text is whole.
    """
    started = time.monotonic()
    total = len(doses) + controls + 5
    step = _Steps(report, total)
    step("the unsteered margin")
    base = bench.margins()
    step("the unsteered text")
    prompts = [row["prompt"] for row in bench.neutral[:SAMPLES]]
    _, base_repetition = bench.texts(prompts)
    rows: list[Dose] = []
    for dose in sorted(doses):
        step(f"dose {dose:+g}")
        rows.append(_at_dose(bench, digest, dose, base, base_repetition, prompts))
        note(kind="dose", **asdict(rows[-1]))
    broken = [r for r in rows if r.repetition >= BROKEN_REPETITION + base_repetition]
    break_dose = min((abs(r.dose) for r in broken), default=None)
    working = _working(rows, kl_budget, break_dose)
    step("the opposite dose")
    opposite = _change(bench.margins(steer=f"{digest}={-working.dose!r}"), base)
    few = replace(bench, pairs=bench.pairs[:CONTROL_PAIRS])
    step("the vector on the controls' pairs")
    mine = _change(few.margins(steer=f"{digest}={working.dose!r}"), base[:CONTROL_PAIRS])
    changes: list[dict[str, float]] = []
    for number in range(controls):
        step(f"random direction {number + 1} of {controls}")
        control = random_like(vector, seed * 10_000 + number)
        put = library.put_vector(control)
        change = _change(few.margins(steer=f"{put}={working.dose!r}"), base[:CONTROL_PAIRS])
        changes.append({"seed": float(number), "change": change})
        note(kind="random", seed=number, change=change)
    step("the prompt that asks for it")
    prompted = bench.margins(system=instruction)
    p_value = permutation_p(mine, [c["change"] for c in changes])
    reasons = _rules(working, opposite, p_value, controls, kl_budget)
    return Verdict(
        vector=name,
        digest=digest,
        passed=all(r.passed for r in reasons),
        reasons=reasons,
        working_dose=working.dose,
        break_dose=break_dose,
        base_margin=sum(base) / len(base),
        doses=tuple(rows),
        random=tuple(changes),
        random_dose=working.dose,
        p_value=p_value,
        opposite_change=opposite,
        prompt={
            "instruction": instruction,
            "margin": sum(prompted) / len(prompted),
            "change": _change(prompted, base),
        },
        kl_budget=kl_budget,
        pairs=len(base),
        engine=dict(bench.engine.describe()),
        seconds=time.monotonic() - started,
    )


class _Steps:
    def __init__(self, report: Report, total: int) -> None:
        self.report, self.total, self.done = report, total, 0

    def __call__(self, words: str) -> None:
        self.report(self.done / self.total, f"measuring {words}")
        self.done += 1


def _at_dose(
    bench: Bench,
    digest: str,
    dose: float,
    base: Sequence[float],
    base_repetition: float,
    prompts: Sequence[str],
) -> Dose:
    steer = f"{digest}={dose!r}" if dose else ""
    margins = bench.margins(steer=steer)
    mean, low, high = bootstrap_mean(margins)
    changes = [a - b for a, b in zip(margins, base, strict=True)]
    change, change_low, change_high = bootstrap_mean(changes)
    side = bench.side_effects(steer=steer)
    texts, repeated = bench.texts(prompts, steer=steer)
    return Dose(
        dose,
        mean,
        low,
        high,
        change,
        change_low,
        change_high,
        side.kl,
        side.kl_p95,
        repeated,
        texts[0],
    )


def _change(margins: Sequence[float], base: Sequence[float]) -> float:
    return sum(a - b for a, b in zip(margins, base, strict=True)) / len(base)


def _working(rows: Sequence[Dose], budget: float, break_dose: float | None) -> Dose:
    """The largest positive dose within the budget and below the break; else the smallest."""
    positive = [r for r in rows if r.dose > 0] or list(rows)
    whole = [
        r for r in positive if r.kl <= budget and (break_dose is None or abs(r.dose) < break_dose)
    ]
    return max(whole, key=lambda r: r.dose) if whole else min(positive, key=lambda r: abs(r.dose))


def _rules(
    working: Dose, opposite: float, p_value: float, controls: int, budget: float
) -> tuple[Rule, ...]:
    low, high = working.change_low, working.change_high
    enough = controls >= FEWEST_CONTROLS
    # Each that does as much as the vector adds one to the numerator of (1 + as much) / (1 + all).
    beats_all = p_value * (controls + 1) < 1.5
    return (
        Rule(
            "effect",
            low > 0,
            f"At dose {working.dose:g} the margin changes by {working.change:+.2f} nats "
            f"(95 % interval {low:+.2f} to {high:+.2f}), which "
            f"{'excludes' if low > 0 else 'does not exclude'} 0.",
        ),
        Rule(
            "opposite",
            opposite < 0 < working.change,
            f"The opposite dose changes it by {opposite:+.2f}, "
            f"{'the other way' if opposite < 0 < working.change else 'not the other way'}.",
        ),
        Rule(
            "random",
            enough and beats_all,
            f"Against {controls} random directions of equal norm p = {p_value:.3f}"
            + ("." if enough else f"; at least {FEWEST_CONTROLS} are needed to pass.")
            + ("" if beats_all else " Not all of them are beaten."),
        ),
        Rule(
            "side effects",
            working.kl <= budget,
            f"On neutral text the tokens' KL is {working.kl:.3f} nats, "
            f"{'within' if working.kl <= budget else 'over'} the budget of {budget:g}.",
        ),
    )
