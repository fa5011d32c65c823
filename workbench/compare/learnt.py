"""Whether a behaviour that came from a person's own data is in the weights, by the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from workbench.compare.compare import Report, recovered_of
from workbench.engines.base import BASE_WEIGHTS
from workbench.train.examples import Example
from workbench.verify.measure import Bench

__all__ = ["Learnt", "measure_learnt"]


@dataclass(frozen=True)
class Learnt:
    """What was measured, on decisions that were never learnt.

    Args:
        log_prob: mean log-probability of a held-out decision's token, in nats: "base" with the
            stripped context, "instructed" for the base with the instructions in it, "trained" with
            the stripped context. Empty where no decision is held out.
        recovered: (trained - base) / (instructed - base), not clipped; None without instructions.
        margin: of the held-out pairs, "base" and "trained", where the data is a contrast set.
        kl: token KL of the trained model to the base on neutral text, in nats.
    """

    log_prob: dict[str, float]
    recovered: float | None
    margin: dict[str, float]
    kl: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """For storing and showing."""
        return asdict(self)


def measure_learnt(
    bench: Bench,
    exam: Sequence[Example],
    trained: str,
    report: Report = lambda share, words: None,
) -> Learnt:
    """Measure the base and the weight state `trained` on held-out decisions and neutral text.

    Margins are measured where the bench has pairs.
    """
    instructed = bool(exam) and all(e.instructed_ids is not None for e in exam)
    log_prob: dict[str, float] = {}
    margin: dict[str, float] = {}
    # All work on the base's weights is done before the swap.
    report(0.0, "measuring the base")
    if exam:
        log_prob["base"] = _mean(bench, exam, BASE_WEIGHTS, False)
    if instructed:
        log_prob["instructed"] = _mean(bench, exam, BASE_WEIGHTS, True)
    if bench.pairs:
        margin["base"] = _margin(bench, BASE_WEIGHTS)
    _ = bench.base_tables
    report(0.5, "measuring the trained model")
    if exam:
        log_prob["trained"] = _mean(bench, exam, trained, False)
    if bench.pairs:
        margin["trained"] = _margin(bench, trained)
    kl = {"trained": bench.side_effects(weights=trained).kl}
    recovered = None
    if instructed:
        recovered = recovered_of(log_prob["base"], log_prob["instructed"], log_prob["trained"])
    return Learnt(log_prob, recovered, margin, kl)


def _mean(bench: Bench, exam: Sequence[Example], weights: str, instructed: bool) -> float:
    read = [example.read_by_teacher if instructed else example.decision for example in exam]
    scored = bench.engine.score(
        [(d.context_ids, d.decision_ids) for d in read], weights=weights, cancel=bench.cancelled
    )
    return sum(scored) / sum(len(decision.decision_ids) for decision in read)


def _margin(bench: Bench, weights: str) -> float:
    margins = bench.margins(weights=weights)
    return sum(margins) / len(margins)
