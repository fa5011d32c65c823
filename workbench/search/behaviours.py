"""Behaviours as a person names them: contrast sets, each with how much it counts."""

from __future__ import annotations

import math

from vectors.errors import ContrastSetError, GrammarError
from workbench.data.contrast import ContrastPair, ContrastSet

__all__ = ["check_measurable", "parse_behaviour", "parse_behaviours", "some_held_out"]

LARGEST = 100.0


def parse_behaviour(text: str) -> tuple[str, float]:
    """Parse `SET` or `SET=WEIGHT`: a set's name or file, and how much its margin counts.

    A negative weight wants the margin to fall.

    Raises:
        GrammarError: no set, or a weight that is 0, not finite or too large.
    """
    named, given, number = text.strip().rpartition("=")
    if not given:
        named, number = text.strip(), "1"
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not named or not 0 < abs(weight) <= LARGEST:
        raise GrammarError(
            f"{text[:80]!r} is not a behaviour; write the name or file of a contrast set, with a "
            "weight where it counts more or should fall, as in cheerful or formal=-1."
        )
    return named, weight


def parse_behaviours(texts: list[str]) -> dict[str, float]:
    """Parse several.

    Raises:
        GrammarError: one that does not parse, or a set that is named twice.
    """
    found = [parse_behaviour(text) for text in texts]
    if len(dict(found)) != len(found):
        raise GrammarError("A behaviour is named twice; give each set once, with its weight.")
    return dict(found)


def check_measurable(contrast: ContrastSet) -> ContrastSet:
    """Return `contrast`, or raise ContrastSetError where it has no completions to measure."""
    if contrast.by_instruction:
        raise ContrastSetError(
            f"The set '{contrast.name}' has instructions and no completions, so that it has no "
            "margin; name a set with completions."
        )
    return contrast


def some_held_out(contrast: ContrastSet, most: int | None) -> tuple[ContrastPair, ...]:
    """At most `most` held-out pairs, by the hash of their prompts and so without a preference."""
    if most is None:
        return contrast.held_out
    return tuple(sorted(contrast.held_out, key=lambda pair: pair.key)[:most])
