"""The forms of a search and of a bisection: what they offer, what they ask for, what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the page's extra is not installed")

import torch

from ui.forms import changed
from ui.session import Session
from ui.tabs.library import bisect, search
from vectors.errors import InputError, NameNotFound
from workbench.runs.parameters import checked
from workbench.runs.record import RunRecord, RunState, write_json
from workbench.search.ways import COEFFICIENTS
from workbench.service import Workbench

BASE = "ab" * 32
EMPTY = ("together", "", "", "", "")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    """A library with task vectors `glad`, made from `formal`, and `sad`, which has three revisions."""
    with Workbench(tmp_path_factory.mktemp("forms") / "home") as wb:
        made = {"info": {"contrast": {"name": "formal"}}}
        for size in (1.0, 2.0, 3.0):
            before, after = {"w": torch.zeros(4)}, {"w": torch.full((4,), size)}
            wb.library.save_task("sad", BASE, before, after)
        wb.library.save_task("glad", BASE, {"w": torch.zeros(4)}, {"w": torch.ones(4)}, **made)
        wb.library.save_task("foreign", "cd" * 32, {"w": torch.zeros(4)}, {"w": torch.ones(4)})
        yield wb


@pytest.fixture
def session(kept: Workbench) -> Session:
    found = Session(kept, autostart=False)
    found.base = BASE[:12]
    return found


def asked(kept: Workbench, kind: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return checked(kind, {"model": "m", "engine": "vllm", **parameters}, kept)


# -- search -------------------------------------------------------------------------------------


def test_the_newest_and_its_own_behaviour_are_chosen_at_first(session: Session) -> None:
    recipe, behaviours = search.offered(session, [], [])
    assert (recipe["value"], recipe["choices"]) == (["glad"], ["glad", "sad"])
    assert behaviours["value"] == ["formal"]
    assert ("brief should fall", "brief=-1") in behaviours["choices"]


def test_what_was_chosen_or_typed_stays_while_it_exists(session: Session) -> None:
    recipe, behaviours = search.offered(session, ["sad@2=-0.5", "gone"], ["brief=0.3"])
    assert recipe["value"] == ["sad@2=-0.5"] and recipe["value"][0] in recipe["choices"]
    assert behaviours["value"] == ["brief=0.3"]


def test_a_late_answer_takes_no_choice_back(session: Session) -> None:
    updates = search.offered(session, ["glad"], [])
    kept, filled = changed(updates, (["glad"], []))
    assert "value" not in kept and kept["choices"] == updates[0]["choices"]
    assert filled["value"] == ["formal"], "what was empty is filled"


def test_an_empty_form_asks_for_the_defaults(kept: Workbench) -> None:
    assert search.parameters(["glad"], ["cheerful"], None, None, None, None, None) == {
        "recipe": "glad", "behaviours": ["cheerful"], "way": "together",
    }  # fmt: skip
    found = asked(kept, "search", search.parameters(["glad"], ["cheerful"], *EMPTY))
    assert (found["coefficients"], found["pairs"]) == (list(COEFFICIENTS), None)
    assert ", ".join(f"{c:g}" for c in found["coefficients"]) == search.STANDARD
    assert float(search.BUDGET) == found["budget"]


def test_a_full_form_is_what_the_run_is_asked(kept: Workbench) -> None:
    fields = ("each", "0, 1", "glad: -1, 2\n\n sad@3 : 0.5", "12", "1")
    told = search.parameters(["glad", "sad@3=-0.5"], ["cheerful", "formal=-1"], *fields)
    found = asked(kept, "search", told)
    assert found["recipe"] == "glad,sad@3=-0.5" and found["way"] == "each"
    assert found["behaviours"] == ["cheerful=1.0", "formal=-1.0"]
    assert found["ranges"] == {"glad": [-1.0, 2.0], "sad@3": [0.5]}
    assert (found["coefficients"], found["pairs"], found["budget"]) == ([0.0, 1.0], 12, 1.0)


@pytest.mark.parametrize(
    ("recipe", "behaviours", "fields", "words"),
    [
        ([], ["cheerful"], EMPTY, "Choose a task vector"),
        (["glad"], [], EMPTY, "Choose at least one behaviour"),
        (["glad"], ["cheerful"], ("together", "1, x", "", "", ""), "coefficient must be a number"),
        (["glad"], ["cheerful"], ("each", "", "glad 1", "", ""), "names no coefficients"),
        (["glad"], ["cheerful"], ("each", "", "glad: 1, <b>", "", ""), "coefficient of 'glad'"),
        (["glad"], ["cheerful"], ("each", "", "nobody: 1", "", ""), "'nobody' is no ingredient"),
        (["glad"], ["cheerful"], ("together", "", "glad: 1", "", ""), "the same coefficients"),
        (["glad"], ["cheerful"], ("together", "", "", "many", ""), "try 12"),
        (["glad"], ["cheerful"], ("together", "", "", "3", ""), "'pairs'"),
        (["glad"], ["cheerful"], ("together", "", "", "", "-1"), "'budget'"),
        (["glad=x"], ["cheerful"], EMPTY, "weight of .glad. must be"),
        (["glad"], ["cheerful", "cheerful=-1"], EMPTY, "named twice"),
        (["glad"], ["<b>"], EMPTY, "contrast set"),
    ],
)
def test_what_is_wrong_is_a_sentence(
    kept: Workbench, recipe: list[str], behaviours: list[str], fields: Any, words: str
) -> None:
    with pytest.raises(InputError, match=words) as told:
        asked(kept, "search", search.parameters(recipe, behaviours, *fields))
    assert str(told.value).endswith(".")


def test_the_best_is_kept_once_and_only_by_a_search_that_is_done(session: Session) -> None:
    wb = session.wb
    best = {"coefficients": {"glad": 0.5}, "terms": "glad=0.5"}
    digest = wb.library.get("glad").digest
    result = {
        "best": best, "confirmed": {}, "behaviours": [{"name": "formal"}], "base_digest": BASE,
        "method": "linear", "options": {},
        "ingredients": [{"name": "glad", "weight": 1.0, "digest": digest}],
    }  # fmt: skip
    folder = wb.home.runs / "search-1"
    folder.mkdir()
    asked = RunRecord(id="search-1", kind="search", parameters={}, asked_at=1.0)
    write_json(folder / "run.json", asked.model_dump())
    write_json(folder / "result.json", result)
    write_json(folder / "state.json", RunState(state="cancelled").model_dump())
    with pytest.raises(InputError, match="no search that is done"):
        search.kept(session, "search-1", "")
    write_json(folder / "state.json", RunState(state="done").model_dump())
    made = search.kept(session, "search-1", "")
    assert (made["name"], made["revision"], made["terms"]) == ("glad-best", 1, "glad=0.5")
    assert search.kept(session, "search-1", "")["revision"] == 1
    assert wb.library.load_recipe("glad-best")[1].terms == ((digest, 0.5),)
    assert [a["best"] for a in wb.library.attestations(made["digest"], "evaluation")] == [best]
    with pytest.raises(InputError, match="name"):
        search.kept(session, "search-1", "<b>")
    with pytest.raises(NameNotFound, match="no run"):
        search.kept(session, "", "")
    wb.library.delete("glad-best")


# -- bisect -------------------------------------------------------------------------------------


def test_the_newest_and_what_was_before_it_are_chosen_at_first(session: Session) -> None:
    good, bad, behaviour = bisect.offered(session, "", "", "")
    assert (good["value"], bad["value"]) == (bisect.BASE, "glad"), "glad has one revision"
    assert bad["choices"] == ["glad", "sad", "sad@2", "sad@1"]
    assert behaviour["choices"][0] == bisect.GENERAL and behaviour["value"] == "cheerful"
    good, bad, behaviour = bisect.offered(session, "", "sad", bisect.GENERAL)
    assert (good["value"], bad["value"], behaviour["value"]) == ("sad@2", "sad", bisect.GENERAL)


def test_an_entry_that_was_typed_stays(session: Session) -> None:
    good, bad, _ = bisect.offered(session, "sad@2026-11-22", "gone", "gone")
    assert good["value"] == "sad@2026-11-22" and good["value"] in good["choices"]
    assert bad["value"] == "glad"


def test_an_empty_library_offers_the_base_and_nothing_else(tmp_path: Any) -> None:
    with Workbench(tmp_path / "home") as empty:
        session = Session(empty, autostart=False)
        good, bad, _ = bisect.offered(session, "", "", "")
        assert (good["value"], bad["value"], bad["choices"]) == (bisect.BASE, None, [])
        recipe, behaviours = search.offered(session, [], [])
        assert recipe["value"] == [] and behaviours["value"] == ["cheerful"]


def test_the_form_is_what_the_bisection_is_asked(kept: Workbench) -> None:
    found = asked(kept, "bisect", bisect.parameters("sad@1", "sad@3", "cheerful", "2", "auto"))
    assert (found["entries"], found["behaviour"], found["threshold"]) == (
        "sad@1..sad@3",
        "cheerful",
        2.0,
    )
    told = bisect.parameters(bisect.BASE, "glad", bisect.GENERAL, "", None)
    assert told == {"entries": "glad", "behaviour": "", "over": "auto"}
    assert asked(kept, "bisect", told)["threshold"] is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ((None, "glad", "cheerful", "", "auto"), "Choose a good and a bad entry"),
        (("glad", bisect.BASE, "cheerful", "", "auto"), "only be the good side"),
        (("glad", "sad", "cheerful", "<b>", "auto"), "threshold must be a number"),
        (("glad", "glad", "cheerful", "", "auto"), "both 'glad'"),
        (("glad", "foreign", "cheerful", "", "auto"), "different bases"),
        (("glad", "<b>", "cheerful", "", "auto"), "<b>"),
        (("glad", "sad@9", "cheerful", "", "auto"), "@9"),
        (("glad", "sad", "cheerful", "", "history"), "two revisions of one name"),
    ],
)
def test_a_wrong_bisection_is_a_sentence(kept: Workbench, fields: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as told:
        asked(kept, "bisect", bisect.parameters(*fields))
    assert str(told.value).endswith(".")
