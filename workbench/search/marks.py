"""What one weight state got in an exam."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Marks"]


@dataclass(frozen=True)
class Marks:
    """What one weight state got: a margin for each held-out pair of each set, and general loss.

    Margins are log p(positive) - log p(negative), summed over the completion's tokens, in nats.
    `general` is the soft loss of training against the base's own distributions, on neutral text, in
    nats a token: 0 for the base, and the measure of forgetting for all others.
    """

    margins: dict[str, list[float]]
    general: float | None = None

    def margin(self, name: str) -> float:
        """The mean margin of a set."""
        return sum(self.margins[name]) / len(self.margins[name])
