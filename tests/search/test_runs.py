"""Both runs on the tiny model: what they find is there, and what they refuse is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vectors.errors import (
    ContrastSetError,
    GrammarError,
    InputError,
    ModelMismatch,
    NameNotFound,
    NameTaken,
)
from vectors.tasks import Recipe
from workbench.engines.transformers import TransformersEngine
from workbench.models.loading import load_tokenizer
from workbench.runs.process import Progress
from workbench.search.exam import Exam
from workbench.search.keep import best_recipe, keep_best
from workbench.search.live import LiveModel
from workbench.verify.measure import Bench


def test_the_margins_are_the_workbenchs_own(searched_home: Any, tmp_path: Path) -> None:
    wb, info = searched_home, searched_home.model()
    contrast = wb.contrast.get("cheerful")
    live = LiveModel(info, wb.library, tmp_path)
    exam = Exam(live, {"cheerful": contrast}, Progress())
    recipe = Recipe(base=info.base, terms=((wb.library.get("glad").digest, 0.5),))
    with live.of(recipe):
        found = exam.take()
    engine = TransformersEngine(info, wb.library, wb.home)
    bench = Bench(engine, load_tokenizer(info), contrast.held_out, ())
    expected = bench.margins(weights=wb.weights("glad=0.5"))
    assert found.margins["cheerful"] == pytest.approx(expected, abs=2e-3)
    base = exam.take()
    assert base.margins["cheerful"] == pytest.approx(bench.margins(), abs=2e-3)
    assert base.general is not None and found.general is not None
    assert base.general < found.general, "the base is the best at its own distributions"


def test_a_search_finds_what_helps_and_keeps_it(searched_home: Any, run: Any) -> None:
    found = run(
        "search",
        recipe="glad,noise",
        behaviours=["cheerful"],
        way="each",
        coefficients=[0, 0.5, 1],
        budget=100,
        name="best",
    )
    assert found["best"]["coefficients"]["glad"] > 0
    assert found["best"]["score"] == max(point["score"] for point in found["points"])
    assert found["confirmed"]["cheerful"]["low"] > 0, found["words"]
    assert found["points"][0] == found["base"] and found["base"]["terms"] == ""
    entry, recipe = searched_home.library.load_recipe("best")
    weights = {searched_home.library.get(n).digest: n for n in ("glad", "noise")}
    assert {weights[d]: w for d, w in recipe.terms} == {
        name: c for name, c in found["best"]["coefficients"].items() if c
    }
    assert found["kept"]["digest"] == entry.digest
    (evidence,) = searched_home.library.attestations(entry.digest, "evaluation")
    assert evidence["confirmed"] == found["confirmed"]
    assert json.loads(json.dumps(found)) == found
    # Kept again after the search: the same recipe, and nothing new under the same name.
    assert keep_best(searched_home.library, found, "best") == found["kept"]
    assert keep_best(searched_home.library, found, "other")["digest"] != ""
    assert searched_home.library.load_recipe("other")[1] == recipe
    with pytest.raises(NameTaken, match="glad"):
        keep_best(searched_home.library, found, "glad")


def test_each_ingredient_may_have_its_own_range_and_few_pairs_are_read(run: Any) -> None:
    found = run(
        "search", recipe="dish", behaviours=["cheerful"], way="each", coefficients=[1],
        ranges={"glad": [0, 2]}, pairs=4, budget=100,
    )  # fmt: skip
    seen = [tuple(point["coefficients"].values()) for point in found["points"]]
    assert seen == [(0, 0), (0, 1), (2, 1)] and found["behaviours"][0]["pairs"] == 4
    assert found["confirmed"]["cheerful"]["pairs"] == 2


def test_a_recipe_is_searched_with_its_own_weights_and_nothing_is_kept(run: Any) -> None:
    found = run("search", recipe="dish", behaviours=["cheerful=-1"], coefficients=[1], budget=1e-3)
    assert [i["weight"] for i in found["ingredients"]] == [1.0, 0.5]
    assert [point["terms"] for point in found["points"]] == ["", "glad=1,noise=0.5"]
    assert found["best"]["terms"] == "" and found["kept"] is None
    with pytest.raises(InputError, match="The base is the best"):
        best_recipe(found)
    with pytest.raises(InputError, match="another version"):
        best_recipe({**found, "ingredients": [{"name": "glad", "weight": 1.0}]})
    assert not found["points"][1]["within"]


def test_another_method_is_searched_like_the_sum(run: Any) -> None:
    found = run(
        "search", recipe="glad,noise", behaviours=["cheerful"], coefficients=[1],
        method="ties", options={"density": 0.5}, budget=100,
    )  # fmt: skip
    assert found["method"] == "ties" and found["options"]["density"] == 0.5
    assert found["points"][1]["general"] > found["base"]["general"]


def test_the_version_that_changed_it(run: Any, tmp_path: Path) -> None:
    found = run("bisect", entries="ramp@1..ramp@7")
    assert (found["found"], found["before"], found["over"]) == ("ramp@5", "ramp@4", "history")
    assert found["words"].startswith("'ramp@5' changed it: the general loss is")
    assert [row["state"] for row in found["measured"]] == ["ramp@1", "ramp@7", "ramp@4"], "5 is 7"
    back = run("bisect", entries="ramp@7..ramp@1")
    assert (back["found"], back["before"]) == ("ramp@4", "ramp@5")
    events = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert [json.loads(e)["kind"] for e in events] == ["measured"] * len(events)


def test_the_ingredient_that_changed_it(run: Any) -> None:
    found = run("bisect", entries="dish", behaviour="cheerful")
    assert found["found"] == "glad" and found["needed"] and found["with"] == []
    assert "'glad' changed it: with it alone" in found["words"]
    general = run("bisect", entries="glad..dish")
    assert general["found"] in ("glad", "noise") and general["over"] == "ingredients"


def test_ingredients_that_only_do_it_together(run: Any, searched_home: Any) -> None:
    alone = run("bisect", entries="noises")
    rows = {row["state"]: row["value"] for row in alone["measured"]}
    top = max(v for name, v in rows.items() if " with " in name)
    assert rows["noises"] > top, "the recipe must lose more than any ingredient of it alone"
    both = run("bisect", entries="noises", threshold=(rows["noises"] + top) / 2)
    assert both["found"] == "ramp@7" and both["with"] == ["noise"] and both["needed"]
    assert "'ramp@7' changed it together with 'noise'" in both["words"]


def test_what_does_not_differ_is_said(run: Any) -> None:
    with pytest.raises(InputError, match="no more apart than chance"):
        run("bisect", entries="ramp@1..ramp@2")
    with pytest.raises(InputError, match="both on one side of the threshold 99"):
        run("bisect", entries="ramp@1..ramp@7", threshold=99)


SEARCH = {"recipe": "glad", "behaviours": ["cheerful"]}
WRONG = [
    ("search", {**SEARCH, "recipe": "nobody"}, NameNotFound, "nobody"),
    ("search", {**SEARCH, "recipe": "glad=x"}, GrammarError, "glad"),
    ("search", {**SEARCH, "recipe": "foreign"}, ModelMismatch, "belongs to base"),
    ("search", {**SEARCH, "recipe": "glad,foreign"}, ModelMismatch, "different bases"),
    ("search", {**SEARCH, "behaviours": ["nothing"]}, NameNotFound, "contrast set"),
    ("search", {**SEARCH, "behaviours": []}, InputError, "'behaviours'"),
    ("search", {**SEARCH, "behaviours": ["cheerful=0"]}, GrammarError, "behaviour"),
    ("search", {**SEARCH, "coefficients": []}, InputError, "'coefficients'"),
    ("search", {**SEARCH, "coefficients": [float("nan")]}, InputError, "'coefficients'"),
    ("search", {**SEARCH, "way": "fast"}, InputError, "'way'"),
    ("search", {**SEARCH, "method": "magic"}, NameNotFound, "magic"),
    ("search", {**SEARCH, "method": "ties", "options": {"x": 1}}, InputError, "x"),
    ("search", {**SEARCH, "ranges": {"glad": [1]}}, InputError, "same coefficients"),
    ("search", {**SEARCH, "way": "each", "ranges": {"dish": [1]}}, InputError, "no ingredient"),
    ("search", {**SEARCH, "way": "each", "ranges": {"glad": []}}, InputError, "'ranges'"),
    ("search", {**SEARCH, "pairs": 3}, InputError, "'pairs'"),
    ("search", {**SEARCH, "budget": 0}, InputError, "'budget'"),
    ("search", {**SEARCH, "name": "glad"}, NameTaken, "task-vector"),
    ("search", {**SEARCH, "name": "Bad Name"}, GrammarError, "Bad Name"),
    ("bisect", {"entries": "ramp@1..ramp@9"}, NameNotFound, "@9"),
    ("bisect", {"entries": "glad..nobody"}, NameNotFound, "nobody"),
    ("bisect", {"entries": "glad..glad"}, InputError, "both 'glad'"),
    ("bisect", {"entries": "twice@1..twice@3"}, InputError, "are the same"),
    ("bisect", {"entries": "glad..foreign"}, ModelMismatch, "different bases"),
    ("bisect", {"entries": "foreign"}, ModelMismatch, "belongs to base"),
    ("bisect", {"entries": "dish", "behaviour": "nothing"}, NameNotFound, "contrast set"),
    ("bisect", {"entries": "dish", "threshold": float("inf")}, InputError, "'threshold'"),
    ("bisect", {"entries": "dish", "over": "time"}, InputError, "'over'"),
    ("bisect", {"entries": "a b"}, GrammarError, "a b"),
]


@pytest.mark.parametrize(("kind", "parameters", "error", "words"), WRONG)
def test_what_is_wrong_is_one_sentence(
    kind: str, parameters: dict[str, Any], error: type[Exception], words: str, run: Any
) -> None:
    with pytest.raises(InputError) as told:
        run(kind, **parameters)
    assert type(told.value) is error and words in str(told.value)
    assert "\n" not in str(told.value) and str(told.value).endswith(".")


def test_instructions_have_no_margin(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    rows = [
        {"prompt": f"P{n}", "positive_instruction": "a", "negative_instruction": "b"}
        for n in range(9)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind, rest in (("search", {"recipe": "glad", "behaviours": [str(path)]}),
                       ("bisect", {"entries": "dish", "behaviour": str(path)})):  # fmt: skip
        with pytest.raises(ContrastSetError, match="has no margin"):
            run(kind, **rest)
