"""Contract: the ways through coefficients, what is chosen, and the halving; without a model."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest

from vectors.errors import GrammarError, InputError
from vectors.tasks import Recipe
from workbench.data.contrast import ContrastPair, ContrastSet
from workbench.search.behaviours import parse_behaviours, some_held_out
from workbench.search.between import parse_between
from workbench.search.bisect import first_changed
from workbench.search.marks import Marks
from workbench.search.search import Ingredient, Search, Searched
from workbench.search.ways import MOST_POINTS, check_points, walk

BASE, A, B = "ab" * 32, "a" * 64, "b" * 64
C = (0.5, 1.0, 2.0)


def asked(way: Any, *rows: tuple[float, ...]) -> list[tuple[float, ...]]:
    seen: list[tuple[float, ...]] = []

    def ask(at: tuple[float, ...]) -> float:
        seen.append(at)
        return -abs(at[0] - 0.5) - abs(at[-1] - 2.0)

    walk(way, rows, ask)
    assert len(seen) == check_points(way, rows)
    return seen


def test_each_way_asks_for_its_points() -> None:
    assert asked("together", C, C) == [(0.5, 0.5), (1.0, 1.0), (2.0, 2.0)]
    assert asked("grid", C, C) == list(product(C, C))
    # The second ingredient is searched with the first at its best.
    assert asked("each", C, C) == [(0.5, 1), (1, 1), (2, 1), (0.5, 0.5), (0.5, 1), (0.5, 2)]


def test_an_ingredient_may_have_coefficients_of_its_own() -> None:
    assert asked("grid", (-1.0, 3.0), C) == list(product((-1.0, 3.0), C))
    assert asked("each", (-1.0, 3.0), (2.0,)) == [(-1, 1), (3, 1), (-1, 2)]


def test_too_many_points_are_refused() -> None:
    assert check_points("grid", [range(7)] * 3) == 343 <= MOST_POINTS
    with pytest.raises(InputError, match="7 x 7 x 7 x 7 coefficients are 2401 points"):
        check_points("grid", [range(7)] * 4)


def search(budget: float = 1.0, wanted: float = 1.0) -> tuple[Searched, list[Recipe]]:
    """Two ingredients: A raises the margin up to 1 and then lowers it; B only costs general loss."""
    measured: list[Recipe] = []

    def measure(recipe: Recipe) -> Marks:
        measured.append(recipe)
        weights = dict(recipe.terms)
        a, b = weights.get(A, 0.0), weights.get(B, 0.0)
        lift = a * (2 - a)
        margins = [spread + lift * (1 + 0.1 * spread) for spread in (-2.0, 0.0, 2.0, 1.0)]
        return Marks({"kind": margins}, 3.0 + a * a / 4 + b)

    made = Search(
        Recipe(base=BASE, terms=((A, 1.0), (B, 1.0))),
        [Ingredient("a", A, 1.0), Ingredient("b", B, 1.0)],
        {"kind": wanted},
        measure,
        budget,
    )
    return made.run("grid", (0.0, 0.5, 1.0, 2.0)), measured


def test_the_best_of_a_grid_and_each_recipe_once() -> None:
    found, measured = search()
    assert found.best.coefficients == {"a": 1.0, "b": 0.0} and found.best.terms == "a=1"
    assert len(measured) == len({r.digest for r in measured}) == len(found.points) == 16
    assert found.base.changes == {"kind": 0.0} and found.base.forgetting == 0.0
    assert found.best.changes["kind"] == pytest.approx(1.025)
    assert found.best.forgetting == pytest.approx(0.25)
    # The pairs that confirm are those that did not choose: the second and the fourth.
    assert found.confirmed["kind"]["change"] == pytest.approx((1.0 + 1.1) / 2)
    deviation = math.sqrt(sum((x - 0.25) ** 2 for x in (-2, 0, 2, 1)) / 4)
    assert found.best.score == pytest.approx((0.8 + 1.2) / 2 / deviation)
    assert "a=1 is the best" in found.words and "+1.05 nats" in found.words
    assert found.confirmed["kind"]["holds"] and "do not confirm" not in found.words


def test_the_budget_and_the_wish_decide() -> None:
    assert search(budget=0.1)[0].best.coefficients == {"a": 0.5, "b": 0.0}
    none, _ = search(budget=0.01)
    assert none.best == none.base and "No coefficients" in none.words
    # Where the margin should fall, nothing helps: at 2 it is only back where it was.
    assert search(wanted=-1.0)[0].best.score == 0.0


def test_ranges_go_by_the_ingredients_names() -> None:
    made = Search(
        Recipe(base=BASE, terms=((A, 1.0), (B, 1.0))),
        [Ingredient("a", A, 1.0), Ingredient("b", B, 1.0)],
        {"kind": 1.0},
        lambda recipe: Marks({"kind": [0.0, 1.0, 2.0, 3.0]}, 0.0),
        1.0,
    )
    found = made.run("grid", (1.0,), {"b": (-1.0, 2.0)})
    assert [p.coefficients for p in found.points[1:]] == [{"a": 1, "b": -1}, {"a": 1, "b": 2}]


def test_fewer_held_out_pairs_are_chosen_without_a_preference() -> None:
    pairs = [ContrastPair(prompt=f"P{n}", positive="a", negative="b") for n in range(200)]
    contrast = ContrastSet("x", tuple(pairs))
    some = some_held_out(contrast, 6)
    assert len(some) == 6 and set(some) < set(contrast.held_out)
    turned = ContrastSet("x", tuple(reversed(pairs)))
    assert some_held_out(turned, 6) == some, "the order of the file plays no part"
    assert some_held_out(contrast, None) == contrast.held_out
    assert len(some_held_out(contrast, 10_000)) == len(contrast.held_out)


def test_what_the_other_pairs_do_not_confirm_is_said() -> None:
    def measure(recipe: Recipe) -> Marks:
        lift = 1.0 if recipe.terms else 0.0
        return Marks({"kind": [0.0 + lift, 1.0 - lift, 2.0 + lift, 3.0 - lift]}, 0.0)

    made = Search(
        Recipe(base=BASE, terms=((A, 1.0),)), [Ingredient("a", A, 1.0)], {"kind": 1.0}, measure, 1
    )
    found = made.run("together", (1.0,))
    assert found.best.terms == "a=1" and found.confirmed["kind"]["change"] == -1.0
    assert not found.confirmed["kind"]["holds"]
    assert found.words.endswith("They do not confirm that 'kind' moves as wanted.")


def test_a_model_that_breaks_is_never_the_best() -> None:
    def measure(recipe: Recipe) -> Marks:
        broken = bool(recipe.terms)
        return Marks({"kind": [math.nan if broken else 1.0] * 4}, math.nan if broken else 1.0)

    made = Search(
        Recipe(base=BASE, terms=((A, 1.0),)), [Ingredient("a", A, 1.0)], {"kind": 1.0}, measure, 1
    )
    assert made.run("together", (1.0, 2.0)).best.terms == ""


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (["cheerful"], {"cheerful": 1.0}),
        (["cheerful=2", "formal=-0.5"], {"cheerful": 2.0, "formal": -0.5}),
        (["/a=b/set.jsonl=1"], {"/a=b/set.jsonl": 1.0}),
    ],
)
def test_behaviours_are_read(texts: list[str], found: dict[str, float]) -> None:
    assert parse_behaviours(texts) == found


@pytest.mark.parametrize(
    "texts", [["a=0"], ["=1"], ["a=x"], ["a=nan"], ["a=1e9"], ["a", "a=2"], [""]]
)
def test_bad_behaviours_are_refused(texts: list[str]) -> None:
    with pytest.raises(GrammarError, match="behaviour"):
        parse_behaviours(texts)


def test_between() -> None:
    assert parse_between("a@1..a@5") == ("a@1", "a@5", "history")
    assert parse_between("a@2026-11-01..a") == ("a@2026-11-01", "a", "history")
    assert parse_between("a..b") == ("a", "b", "ingredients")
    assert parse_between("dish") == ("", "dish", "ingredients")
    assert parse_between("a@1..a@5", "ingredients") == ("a@1", "a@5", "ingredients")
    for bad in ("", "..a", "a..", "a..b..c", "a@1..a@1", "a..a"):
        with pytest.raises(InputError):
            parse_between(bad)
    for bad in ("a..b", "a"):
        with pytest.raises(InputError, match="two revisions of one name"):
            parse_between(bad, "history")


@pytest.mark.parametrize("last", [*range(1, 18), 100, 1000])
def test_halving_finds_the_change_in_few_questions(last: int) -> None:
    for place in range(1, last + 1) if last < 50 else (1, 2, last // 3, last):
        asked: list[int] = []

        def changed(at: int, place: int = place, asked: list[int] = asked) -> bool:
            asked.append(at)
            return at >= place

        assert first_changed(last, changed) == place
        assert len(asked) <= math.ceil(math.log2(last)) and not {0, last} & set(asked)


def test_halving_ends_between_neighbours_whatever_lies_between() -> None:
    states = [False, True, False, False, True, False, True]
    found = first_changed(6, lambda at: states[at])
    assert states[found] and not states[found - 1]
