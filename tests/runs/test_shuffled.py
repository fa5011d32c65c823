"""A set that says nothing fails on the bundled model, through a real engine."""

from __future__ import annotations

import json
import random

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


def shuffled(workbench, name):
    """The set `cheerful` with half of its pairs, by a coin, turned round."""
    coin = random.Random(0)
    rows = []
    for pair in workbench.contrast.get("cheerful").pairs:
        sides = [pair.positive, pair.negative]
        coin.shuffle(sides)
        rows.append({"prompt": pair.prompt, "positive": sides[0], "negative": sides[1]})
    return workbench.contrast.save(name, "".join(json.dumps(row) + "\n" for row in rows))


def test_a_shuffled_set_fails_on_the_bundled_model(workbench):
    shuffled(workbench, "coin")
    result = workbench.extract("coin", name="coin")
    assert result["steerable"] == "no", result["words"]
    workbench.engine()
    verdict = workbench.verify("coin", doses=[0.2], controls=1)
    effect = next(rule for rule in verdict["reasons"] if rule["rule"] == "effect")
    assert not verdict["passed"] and not effect["passed"], verdict["reasons"]
