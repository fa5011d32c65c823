"""The Library tab without a browser: its pictures, its forms, and what it says when things are wrong."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the page's extra is not installed")

import gradio as gr
import torch
from safetensors.torch import load_file

from ui.app import make_page
from ui.session import Session
from ui.tabs.library import acts, details, meeting, options, origins, pictures, recipes, versions
from vectors.errors import InputError, NameNotFound
from vectors.types import SteeringVector
from workbench.service import Workbench

EVIL = "<a href=x>y</a>$z$&"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Workbench]:
    """A library of the tiny model: a vector twice, two task vectors, a TIES recipe, a strange one."""
    home = tmp_path_factory.mktemp("shelf") / "home"
    with Workbench(home, str(tiny_folder)) as wb:
        base = wb.model().base
        for step in (1.0, -1.0):
            v_D = torch.nn.functional.normalize(torch.arange(4.0) + step, dim=0)
            wb.library.save_vector("kind", SteeringVector(base, {1: v_D}, {1: 3.0}, 1))
        files = tiny_folder.glob("*.safetensors")
        weights = {name: x for file in files for name, x in load_file(file).items()}
        places = sorted(name for name in weights if "down_proj" in name)
        parents = [wb.library.get("kind@1").digest]
        for name, steps in (("up", (0.01, 0.02)), ("down", (-0.01, 0.03))):
            before = {place: weights[place] for place in places[:2]}
            after = {p: x + s for (p, x), s in zip(before.items(), steps, strict=True)}
            wb.library.save_task(name, base, before, after, parents=parents)
        wb.combine("both", "up=1,down=-0.25", "ties", {"density": 0.5})
        foreign = {EVIL: torch.zeros(2)}
        wb.library.save_task("odd", "ab" * 32, foreign, {EVIL: torch.ones(2)}, info={"x": EVIL})
        yield wb


@pytest.fixture
def session(kept: Workbench) -> Session:
    return Session(kept, autostart=False)


@pytest.fixture(scope="module")
def form(kept: Workbench) -> options.Options:
    with gr.Blocks():
        return options.Options(Session(kept, autostart=False))


def texts(figure: Any) -> str:
    """Everything that Plotly would draw as text."""
    return json.dumps(json.loads(figure.to_json()), ensure_ascii=False)


# -- lineage ------------------------------------------------------------------------------------


def test_lineage_is_drawn_with_its_table(session: Session) -> None:
    box, figure, rows = origins.drawn(session, "both")
    assert not box["visible"]
    names = {trace.name for trace in figure.data}
    assert {"made of", "steering-vector", "task-vector", "recipe"} <= names
    assert list(figure.layout.yaxis.ticktext) == ["kind", "up", "down", "both"]
    assert {a.text for a in figure.layout.annotations} == {"x 1", "x -0.25"}
    assert rows[-1][:2] == ["both@1", "recipe"] and "down@1 x -0.25" in rows[-1][3]


def test_lineage_shows_runs_and_marks_the_entry() -> None:
    place = {"key": "a@1", "name": "a", "revision": 1, "digest": "0" * 64, "kind": "recipe",
             "created": "2026-11-22T10:00:00.000+00:00"}  # fmt: skip
    run = {"id": "train-1", "kind": "train", "asked_at": 1.0}
    links = [{"source": "train-1", "target": "a@1", "how": "made by", "weight": None}]
    found = {"entry": "a@1", "places": [place], "links": links, "runs": [run]}
    figure = pictures.lineage(found)
    assert list(figure.layout.yaxis.ticktext) == ["a", "runs"]
    (recipe,) = [trace for trace in figure.data if trace.name == "recipe"]
    assert list(recipe.marker.size) == [20]
    (made,) = [trace for trace in figure.data if trace.name == "made by"]
    assert list(made.x) == [0, 1, None] and list(made.y) == [-1, 0, None]


def test_nothing_to_draw_is_said() -> None:
    empty = {"entry": "", "places": [], "links": [], "runs": []}
    assert pictures.lineage(empty).layout.annotations[0].text == "Nothing to draw"


# -- versions -----------------------------------------------------------------------------------


def test_the_last_two_revisions_are_offered(session: Session) -> None:
    old, new = versions.offered(session, "kind")
    assert (old["value"], new["value"]) == ("kind@1", "kind@2")
    assert {"up", "both"} <= set(old["choices"])
    assert [u["value"] for u in versions.offered(session, "up")] == ["up@1", "up@1"]
    assert versions.offered(session, None)[0]["value"] is None


def test_tensors_are_compared_by_layer(session: Session) -> None:
    box, result, figure, rows = versions.compared(session, "up", "down")
    assert "2 tensors differ" in box["value"] and result["visible"]
    assert [trace.name for trace in figure.data][:2] == ["up@1", "down@1"]
    assert list(figure.data[0].x) == ["0", "1"]
    assert rows[0][1] == "changed" and " to " in rows[0][4]


def test_vectors_and_recipes_are_compared_by_what_they_are(session: Session) -> None:
    _, _, figure, rows = versions.compared(session, "kind@1", "kind@2")
    assert figure.data[0].name == "cosine of the directions" and rows[0][0] == "block 1"
    session.wb.combine("both", "up=1,down=0.5")
    _, _, figure, rows = versions.compared(session, "both@1", "both@2")
    assert list(figure.data[0].x) == ["down"] and list(figure.data[1].y) == [0.5]
    assert rows[0] == ["down", "weight", "-0.25", "0.5", ""]
    session.wb.library.undo()
    box, result, *_ = versions.compared(session, "both", "both@1")
    assert "bit for bit" in box["value"] and not result["visible"]


def test_what_cannot_be_compared_is_a_sentence(session: Session) -> None:
    with pytest.raises(NameNotFound, match="nobody"):
        versions.compared(session, "nobody", "up")
    with pytest.raises(InputError, match="Choose an entry"):
        versions.compared(session, "  ", None)


def test_text_of_entries_is_never_markup(session: Session) -> None:
    box, _, figure, _ = versions.compared(session, "up", "odd")
    assert "different models" in box["value"]
    pair = {"first": EVIL, "second": "b", "cosine": 0.5, "conflict": 0.1, "overlap": 0.2}
    place = {"key": EVIL, "name": EVIL, "revision": 1, "digest": "0" * 64, "kind": EVIL,
             "created": ""}  # fmt: skip
    run = {"id": EVIL, "kind": EVIL, "asked_at": 1.0}
    layers = [{"layer": EVIL, "old_norm": 1.0, "new_norm": 2.0, "least": 1.0, "most": 3.0}]
    found = {"names": [EVIL, EVIL], "blocks": [], "terms": [], "layers": layers}
    figures = [
        figure,
        pictures.lineage({"entry": EVIL, "places": [place], "links": [], "runs": [run]}),
        pictures.interference({"whole": [pair], "layers": {EVIL: [pair]}}),
        pictures.differences(found),
    ]
    for drawn in figures:
        assert "<a " not in texts(drawn) and "$z$" not in texts(drawn)
    assert all("&lt;a href=x" in texts(drawn) for drawn in figures[1:])


# -- interference -------------------------------------------------------------------------------


def test_interference_is_seen_before_merging(session: Session) -> None:
    box, result, figure, rows = meeting.met(session, ["up", "down"])
    assert "'down' and 'up'" in html.unescape(box["value"]) and result["visible"]
    assert len(figure.data) == 3 and list(figure.data[0].x) == ["0", "1", "all"]
    assert list(figure.data[0].y) == ["down and up"]
    # Opposite in the first layer, alike in the second.
    assert figure.data[0].z[0][0] == pytest.approx(-1, abs=0.05)
    assert figure.data[0].z[0][1] == pytest.approx(1, abs=0.05)
    assert figure.data[1].z[0][0] == pytest.approx(1, abs=0.05)
    assert rows[0][:3] == ["all", "down", "up"]


def test_recipes_are_opened_before_they_meet(session: Session) -> None:
    assert len(meeting.met(session, ["both"])[2].data) == 3
    with pytest.raises(InputError, match="at least two"):
        meeting.met(session, ["up", "up"])


# -- recipes ------------------------------------------------------------------------------------


def test_sliders_follow_what_is_chosen() -> None:
    names, first, second, *rest = recipes.weighed(["a", "b"], ["b", "c"], [0.3, 0.7])
    assert names == ["a", "b"]
    assert (first["label"], first["value"], second["value"]) == ("a", 1.0, 0.3)
    assert not any(update["visible"] for update in rest) and len(rest) == recipes.MOST - 2
    _, far, *_ = recipes.weighed(["a"], ["a"], [-7.5])
    assert (far["minimum"], far["maximum"], far["value"]) == (-7.5, 7.5, -7.5)


def test_a_recipe_goes_through_the_form_and_back(session: Session, form: options.Options) -> None:
    parts = session.wb.parts("both")
    chosen, names, *rest = recipes.edited(session, parts, form)
    sliders, (method, *shown, called) = rest[: recipes.MOST], rest[recipes.MOST :]
    assert chosen["value"] == names == ["up", "down"] or set(names) == {"up", "down"}
    assert (method["value"], called) == ("ties", "both")
    values = [update.get("value") for update in shown[2:]]
    weights = [update.get("value") for update in sliders]
    told = form.read(method["value"], *values)
    assert told == ("ties", {k: v for k, v in parts["options"].items() if k != "tie_rule"})
    made = recipes.kept(session, "again", names, weights, told)
    assert session.wb.library.get("again").info["op"] == session.wb.library.get("both").info["op"]
    assert session.wb.library.load_recipe("again")[1] == session.wb.library.load_recipe("both")[1]
    assert made["revision"] == 1
    session.wb.library.undo()


def test_what_is_written_is_the_grammar() -> None:
    assert recipes.written(["a", "b@2"], [0.30000000000000004, None]) == "a=0.3,b@2=1"
    with pytest.raises(InputError, match="Choose task vectors"):
        recipes.written([], [1.0])


def test_only_what_fits_the_model_is_offered(session: Session) -> None:
    assert set(recipes.ingredients(session, [])["choices"]) == {"up", "down", "both", "odd"}
    session.base = session.wb.model().base[:12]
    offer = recipes.ingredients(session, ["up", "gone", "down@1"])
    assert set(offer["choices"]) == {"up", "down", "both", "down@1"}
    assert offer["value"] == ["up", "down@1"]


def test_the_form_has_every_option_of_every_method(kept: Workbench, form: options.Options) -> None:
    for row in kept.merge_methods():
        about, box, *pool = form.shown(row["name"])
        assert row["summary"] in html.unescape(about)
        given = {u["label"].replace(" ", "_"): u for u in pool if u["visible"]}
        fields = {k: f for k, f in row["options"].items() if options.kind_of(f)}
        assert set(given) == set(fields) and box["visible"] == bool(fields)
        for name, field in fields.items():
            assert (given[name]["value"], given[name]["info"]) == (
                field["default"],
                field["description"],
            )
            assert given[name].get("choices") == field.get("enum")
        read = form.read(row["name"], *(u.get("value") for u in pool))
        assert read == (row["name"], {k: f["default"] for k, f in fields.items()})


def test_a_bad_option_is_the_method_s_own_sentence(session: Session) -> None:
    with pytest.raises(InputError, match="option density"):
        recipes.kept(session, "x", ["up", "down"], [1.0, 1.0], ("ties", {"density": 7}))
    with pytest.raises(InputError, match="at least 2"):
        recipes.kept(session, "x", ["up"], [1.0], ("model-stock", {}))


# -- signatures ---------------------------------------------------------------------------------


def test_details_say_who_signed_and_what_is_broken(session: Session) -> None:
    digest = session.wb.library.get("kind").digest
    session.wb.library.attest(digest, "verdict", {"passed": True})
    assert "signed by" not in details._described(session, "kind")[1]
    (made,) = session.wb.sign("kind")
    box, summary, *_ = details._described(session, "kind")
    assert f"{made['key'][:16]} (verdict, this home)" in summary and not box["visible"]
    session.wb.library.attest(digest, "signature", {"key": EVIL})
    assert "A signature has content" in details._described(session, "kind")[0]["value"]


# -- undo ---------------------------------------------------------------------------------------


def test_the_button_says_what_would_be_undone(session: Session) -> None:
    library = session.wb.library
    library.rename("up", "rise")
    button, change = acts._last(session)
    assert button["value"] == "Undo: rename 'up' (to rise)" and button["interactive"]
    library.undo(change)
    assert library.get("up") and acts._last(session)[1] != change


def test_an_empty_library_has_nothing_to_undo(tmp_path: Path) -> None:
    found = Session(Workbench(tmp_path / "home"), autostart=False)
    button, change = acts._last(found)
    assert (button["value"], button["interactive"], change) == ("Nothing to undo", False, 0)


def test_everything_is_folded_at_first(kept: Workbench) -> None:
    page = make_page(Session(kept, autostart=False))
    folded = {b.elem_id: b.open for b in page.blocks.values() if b.get_block_name() == "accordion"}
    parts = ("lineage", "versions", "acts", "recipes", "meeting", "options", "files")
    parts += ("search", "bisect")
    assert not any(folded[f"library-{part}"] for part in parts)
