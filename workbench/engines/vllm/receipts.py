"""What was steered of the requests that clients sent under ids of their own, until they ask for it.

An id may cover any number of requests: of the newest each has its proof, of those before them the sums.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from workbench.engines.vllm.conditions import Decision

__all__ = ["Proof", "Receipt", "Receipts"]

IDS_KEPT = 20_000
ENDED_KEPT = 1024
"""Ended requests of one id that may yet go on, because they were preempted."""
PHASES = ("prompt", "decode", "cached")


@dataclass
class Proof:
    """What was steered of one request: positions `first` to `end`, seen over its whole life."""

    length: int
    start: int
    rows: tuple[int, int]
    blocks: tuple[int, int]
    cached: int
    end: int = 0
    problem: str = ""
    decision: Decision | None = None

    @property
    def declined(self) -> bool:
        """Whether the prompt decided against steering."""
        return self.decision is not None and not self.decision.steered

    def counts(self) -> dict[str, int]:
        """How many positions were steered, in each phase."""

        def steered(low: int, high: int) -> int:
            return max(0, high - max(low, self.start))

        in_prompt, in_decode = bool(self.rows[0]), bool(self.rows[1]) and not self.declined
        cached, end = self.cached, max(self.end, self.cached)
        return {
            "prompt": in_prompt * steered(cached, min(end, self.length)),
            "decode": in_decode * steered(max(cached, self.length), end),
            "cached": in_prompt * steered(0, min(cached, self.length))
            + in_decode * steered(self.length, cached),
        }


@dataclass
class Sums:
    """What the proofs of many requests say together."""

    requests: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    rows: int = 0
    least: int | None = None
    declined: int = 0
    projection: float | None = None
    problem: str = ""

    def add(self, proof: Proof) -> None:
        """Add one request."""
        counts = proof.counts()
        self.requests += 1
        for phase in PHASES:
            self.counts[phase] += counts[phase]
        self.rows = max(self.rows, *proof.blocks)
        if proof.declined:
            self.declined += 1
        else:
            total = sum(counts.values())
            self.least = total if self.least is None else min(self.least, total)
        if proof.decision is not None:
            self.projection = proof.decision.projection
        self.problem = self.problem or proof.problem

    def told(self) -> dict[str, int | float | str | None]:
        """The receipt, as clients get it."""
        return {
            "requests": self.requests,
            **self.counts,
            "rows": self.rows,
            "least": self.least or 0,
            "declined": self.declined,
            "projection": self.projection,
            "problem": self.problem,
        }


class Receipt:
    """The requests of one id."""

    def __init__(self) -> None:
        self._running: dict[str, Proof] = {}
        self._ended: OrderedDict[str, Proof] = OrderedDict()
        self._before = Sums()

    def begin(self, request: str, proof: Proof) -> None:
        """A request begins; one that was preempted keeps what was cached at first and how far it was."""
        before = self._ended.pop(request, None)
        if before is not None:
            proof.cached, proof.end = before.cached, before.end
        self._running[request] = proof

    def end(self, request: str) -> None:
        """A request has ended or was preempted."""
        self._ended[request] = self._running.pop(request)
        while len(self._ended) > ENDED_KEPT:
            self._before.add(self._ended.popitem(last=False)[1])

    def told(self) -> dict[str, int | float | str | None]:
        """How many requests there are, and the distinct positions per phase; asked once."""
        for proof in (*self._ended.values(), *self._running.values()):
            self._before.add(proof)
        return self._before.told()


class Receipts:
    """The receipts of one worker, by id; the oldest are forgotten."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, Receipt] = OrderedDict()

    def __len__(self) -> int:
        return len(self._of)

    def under(self, name: str) -> Receipt:
        """The receipt of an id; that of a request without one is kept by nobody."""
        if not name:
            return Receipt()
        found = self._of.setdefault(name, Receipt())
        while len(self._of) > IDS_KEPT:
            self._of.popitem(last=False)
        return found

    def take(self, name: str) -> Receipt:
        """Return and forget the receipt of an id; an unknown one's is empty."""
        return self._of.pop(name, Receipt())
