"""The JSON form of steering refuses what the text grammar refuses."""

from __future__ import annotations

import json

import pytest

from vectors.errors import DoseError, GrammarError
from vectors.grammar import parse_steer
from workbench.engines.vllm.spec import as_text, parse_request, parse_steering

TERM = {"name": "a", "dose": 0.5}


def form(*terms, **more):
    return json.dumps({"terms": list(terms), **more})


def test_it_says_what_the_text_says():
    terms = [
        {**TERM, "dose": 1, "blocks": [1, 2]},
        {**TERM, "blocks": [1], "phase": "decode"},
        {**TERM, "blocks": [1], "operator": "turn"},
        {**TERM, "revision": "2", "blocks": [1]},
        TERM,
    ]
    text = "a=1:1,a=1:2,a=0.5:1/decode,a=0.5:1!turn,a@2=0.5:1,a=0.5"
    assert parse_request(form(*terms)) == parse_steer(text)


@pytest.mark.parametrize(
    "terms",
    [
        [{**TERM, "blocks": [1, 1]}],
        [TERM, TERM],
        [TERM, {**TERM, "dose": -0.5}],
        [{**TERM, "blocks": [1, 2]}, {**TERM, "blocks": [2]}],
        [{**TERM, "phase": "all"}, TERM],
    ],
)
def test_a_vector_that_is_named_twice_is_refused(terms):
    with pytest.raises(GrammarError, match="named twice"):
        parse_steering(form(*terms))


@pytest.mark.parametrize("dose", ["1", True, None, [1], "nan"])
def test_a_dose_is_a_number(dose):
    with pytest.raises(GrammarError, match=r"wrong at terms\.0\.dose"):
        parse_steering(form({**TERM, "dose": dose}))


@pytest.mark.parametrize("dose", ["1e999", "NaN", "-Infinity", "11", "1" * 400])
def test_a_dose_is_within_range(dose):
    with pytest.raises(DoseError):
        parse_steering(form(TERM).replace("0.5", dose))


@pytest.mark.parametrize("number", ["1", True, 1.5])
def test_a_position_and_a_block_are_whole_numbers(number):
    with pytest.raises(GrammarError, match="wrong at start"):
        parse_steering(form(TERM, start=number))
    with pytest.raises(GrammarError, match=r"wrong at terms\.0\.blocks\.0"):
        parse_steering(form({**TERM, "blocks": [number]}))
    condition = {"name": "b", "block": number, "above": 0}
    with pytest.raises(GrammarError, match=r"wrong at condition\.block"):
        parse_steering(form({**TERM, "phase": "decode"}, condition=condition))


@pytest.mark.parametrize("bound", ["0", True, 1.5])
def test_a_threshold_is_a_number_in_range(bound):
    with pytest.raises(GrammarError, match=r"wrong at condition\.above"):
        parse_steering(form(TERM, condition={"name": "b", "above": bound}))


def test_an_object_that_json_cannot_hold_is_refused():
    deep: dict = {}
    for _ in range(100_000):
        deep = {"terms": deep}
    for steer in (deep, {"dose": object()}, {("a", "b"): 1}):
        with pytest.raises(GrammarError, match="no JSON"):
            as_text(steer)
    assert as_text("cheerful=1") == "cheerful=1" and as_text(["x"]) == ["x"]
    assert json.loads(as_text({"terms": []})) == {"terms": []}
