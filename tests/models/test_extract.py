"""What extraction refuses, and what it says of sets that are too small."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vectors.errors import InputError, NotSteerable
from vectors.steering.diagnostics import FEWEST_TO_TELL, Separation, steerable
from workbench.data.contrast import ContrastPair, ContrastSet
from workbench.extract.extract import _words, extract
from workbench.extract.realise import realise


def asked(prompts: list[str]) -> ContrastSet:
    pairs = [
        ContrastPair(prompt=p, positive_instruction=f"Be glad {n}", negative_instruction="Be sad")
        for n, p in enumerate(prompts)
    ]
    return ContrastSet("asked", tuple(pairs))


def reader(*same: str) -> SimpleNamespace:
    """Answers each instruction differently, but for prompts in `same`."""

    def answers(rows: list[tuple[str, str]], report: object) -> list[str]:
        return [f"reply to {p}" if p in same else f"{i}: {p}" for p, i in rows]

    return SimpleNamespace(answers=answers)


def test_replies_that_make_no_set_are_refused_at_once() -> None:
    prompts = [f"prompt {n}" for n in range(8)]
    assert len(realise(reader(), asked(prompts)).pairs) == 8
    with pytest.raises(NotSteerable, match="has 4 pairs over 4 prompts"):
        realise(reader(*prompts[:4]), asked(prompts))
    # One prompt alone cannot be split into what is learnt and what is held out.
    with pytest.raises(NotSteerable, match="over 1 prompts"):
        realise(reader("B", "C", "D"), asked(["A"] * 5 + ["B", "C", "D"]))
    with pytest.raises(NotSteerable, match="the same on both sides for 8 of 8"):
        realise(reader(*prompts), asked(prompts))


def test_a_position_where_both_sides_are_the_same_is_refused() -> None:
    with pytest.raises(InputError, match="both sides of a pair have read the same"):
        extract(SimpleNamespace(), asked(["A"] * 8), position="prompt-last")  # type: ignore[arg-type]


def test_of_a_small_set_it_is_said_that_it_is_small() -> None:
    perfect = Separation(1.0, 5.0, 1.0, 0.5)
    assert steerable(perfect, FEWEST_TO_TELL) == "yes"
    assert steerable(perfect, FEWEST_TO_TELL - 1) == "no"
    pairs = [ContrastPair(prompt=f"p{n}", positive=f"a{n}", negative=f"b{n}") for n in range(8)]
    contrast = ContrastSet("few", tuple(pairs))
    assert 0 < len(contrast.held_out) < FEWEST_TO_TELL
    words = _words(contrast, "no", 3, perfect)
    assert "too small to tell" in words and "different directions" not in words
