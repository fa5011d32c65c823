"""Property: what is formatted parses back, and nothing that a person types raises anything else."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vectors.errors import DoseError, GrammarError, WorkbenchError
from vectors.grammar import (
    DOSE_LIMIT,
    NAME,
    OPERATORS,
    SteerTerm,
    TaskTerm,
    check_name,
    format_steer,
    format_tasks,
    parse_steer,
    parse_tasks,
)
from vectors.types import Phase

names = st.from_regex(rf"\A{NAME}\Z").filter(lambda name: len(name) <= 100)
revisions = st.none() | st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9:-]{0,20}\Z")
doses = st.floats(-DOSE_LIMIT, DOSE_LIMIT, allow_nan=False)
blocks = st.integers(0, 99_999)


@st.composite
def steer_terms(draw: st.DrawFn) -> SteerTerm:
    """Any term that can be made."""
    first = draw(st.none() | blocks)
    last = None if first is None else draw(st.none() | st.integers(first, 99_999))
    phase = draw(st.sampled_from(Phase))
    operator = draw(st.sampled_from(OPERATORS))
    return SteerTerm(draw(names), draw(doses), draw(revisions), first, last, phase, operator)


task_terms = st.builds(TaskTerm, names, st.floats(-100, 100, allow_nan=False), revisions)
# Text that looks like the grammar finds more than text that does not.
hostile = st.text() | st.text("ab01=:/!@,.-+eE \n\t\0naif٣²", max_size=60)


@settings(max_examples=300)
@given(st.lists(steer_terms(), min_size=1, max_size=4))
def test_steering_terms_round_trip(terms: list[SteerTerm]) -> None:
    assume(len({replace(t, dose=0.0) for t in terms}) == len(terms))
    text = format_steer(terms)
    assert parse_steer(text) == tuple(terms)
    assert format_steer(parse_steer(text)) == text


@settings(max_examples=300)
@given(st.lists(task_terms, min_size=1, max_size=4))
def test_task_terms_round_trip(terms: list[TaskTerm]) -> None:
    assume(len({(t.name, t.revision) for t in terms}) == len(terms))
    assert parse_tasks(format_tasks(terms)) == tuple(terms)


@settings(max_examples=500)
@given(hostile)
def test_hostile_text_raises_nothing_else(text: str) -> None:
    for parse in (parse_steer, parse_tasks, check_name):
        try:
            parse(text)
        except WorkbenchError as error:
            assert "\n" not in str(error), "one sentence"
            assert len(str(error)) < 400


@given(hostile)
def test_what_parses_is_canonical_after_one_round(text: str) -> None:
    try:
        terms = parse_steer(text)
    except WorkbenchError:
        return
    assert all(math.isfinite(term.dose) for term in terms)
    assert parse_steer(format_steer(terms)) == terms


def test_the_whole_grammar() -> None:
    [term] = parse_steer(" cheerful@3=0.2:15-17/decode!add ")
    assert term == SteerTerm("cheerful", 0.2, "3", 15, 17, Phase.DECODE, "add")
    assert list(term.blocks(4)) == [15, 16, 17]
    assert list(SteerTerm("a", 0.1).blocks(4)) == [4]
    assert list(SteerTerm("a", 0.1, None, 9).blocks(4)) == [9]
    assert parse_tasks("baked") == (TaskTerm("baked", 1.0),)
    assert [t.dose for t in parse_steer("a=.5,b=-1e-3,c=+2.")] == [0.5, -0.001, 2.0]


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", ",", "a=0.1,", ",a=0.1", "a", "a=", "=0.1", "A=0.1", "-a=0.1", "a b=0.1"),
        *("a=0.1:x", "a=0.1:5-3", "a=0.1:-3", "a=0.1/up", "a=0.1!mul", "a=0.1:123456"),
        *(
            "a@=0.1",
            "a=0.1,a=0.2",
            "a=0.1:3/decode,a=0.1:3/decode",
            "a=0.1\nb=0.2",
            "x" * 101 + "=1",
        ),
    ],
)
def test_wrong_steering_terms(text: str) -> None:
    with pytest.raises(GrammarError):
        parse_steer(text)


@pytest.mark.parametrize("dose", ["nan", "inf", "-inf", "1e999", "11", "-10.5", "0x1", "1_0", "٣"])
def test_doses_that_are_no_doses(dose: str) -> None:
    with pytest.raises(DoseError):
        parse_steer(f"a={dose}")


def test_one_vector_may_steer_several_blocks_and_phases() -> None:
    assert len(parse_steer("a=0.1:3,a=0.1:4,a=0.1:3/decode,a@2=0.1:3")) == 4


@pytest.mark.parametrize("text", ["a=nan", "a=1e9", "a=1,a=2", "a=1:3", "a=1,,b=1", "a==1"])
def test_wrong_task_terms(text: str) -> None:
    with pytest.raises(GrammarError):
        parse_tasks(text)


def test_a_last_block_needs_a_first_one() -> None:
    with pytest.raises(GrammarError):
        SteerTerm("a", 0.1, last=3)


def test_the_names_of_the_grammar() -> None:
    assert re.fullmatch(NAME, "qwen3.5-0.8b_x")
    with pytest.raises(GrammarError):
        check_name("a\n")
