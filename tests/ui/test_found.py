"""The chart and the table of a search and of a bisection, among the runs of the Library tab."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ui.curves import coefficients, measurements
from ui.tabs.library.found import show_found
from ui.tabs.library.search import show
from workbench.runs.record import RunRecord, RunState, read_run, write_json

EVIL = "<img src=x onerror=alert(1)>"


def point(score: float, within: bool = True, **at: float) -> dict[str, Any]:
    return {
        "coefficients": at,
        "terms": ",".join(f"{n}={c}" for n, c in at.items() if c),
        "changes": {"cheerful": 2 * score},
        "forgetting": sum(c * c for c in at.values()),
        "score": score,
        "within": within,
    }


POINTS = [
    point(0, a=0, b=0),
    point(1, a=0.5, b=0.5),
    point(3, a=1, b=0.5),
    point(2, False, a=1, b=1),
]


def a_run(folder: Path, kind: str, **files: Any) -> Any:
    folder.mkdir()
    asked = RunRecord(id=folder.name, kind=kind, parameters={"way": "grid"}, asked_at=time.time())
    write_json(folder / "run.json", asked.model_dump())
    state = RunState(state="done" if "result" in files else "running", process="1:1")
    write_json(folder / "state.json", state.model_dump())
    if "result" in files:
        write_json(folder / "result.json", files["result"])
    events = files.get("events", [])
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return read_run(folder)


def test_one_coefficient_is_a_curve_for_each_behaviour_and_a_mark_at_the_best() -> None:
    points = [point(s, a=c, b=c) for c, s in ((0, 0), (2, -1), (1, 3))]
    figure = coefficients({"way": "together", "points": points, "best": points[2], "budget": 0.5})
    assert [trace.name for trace in figure.data] == ["'cheerful'", "general loss", "best"]
    star = figure.data[2]
    assert (star.marker.symbol, list(star.x), list(star.y)) == ("star", [1], [6])
    assert list(figure.data[0].x) == [0, 1, 2] and list(figure.data[0].y) == [0, 6, -2]
    assert list(figure.data[1].y) == [0, 2, 8]
    assert sorted(shape.x0 for shape in figure.layout.shapes) == [0, 1]


def test_many_coefficients_are_curves_of_the_best_score() -> None:
    figure = coefficients({"way": "grid", "points": POINTS, "budget": 1})
    named = {trace.name: trace for trace in figure.data}
    assert list(named["a"].x) == [0, 0.5, 1] and list(named["a"].y) == [0, 1, 3]
    assert list(named["b"].y) == [0, 3, 2]
    assert list(named["general loss, b"].y) == [0, 1.25, 2]
    assert "best" not in named, "nothing is chosen while the search goes on"
    done = coefficients({"way": "grid", "points": POINTS, "best": POINTS[2], "budget": 1})
    star = done.data[-1]
    assert star.name == "best" and list(zip(star.x, star.y, strict=True)) == [(1, 3), (0.5, 3)]


def test_a_search_is_shown_under_way_and_done(tmp_path: Path) -> None:
    events = [{"kind": "point", **row} for row in POINTS[:2]]
    whole, sentence, chart, table = show_found(a_run(tmp_path / "now", "search", events=events))
    assert whole["visible"] and not sentence and len(chart.data) == 4
    assert len(table["value"]) == 2 and table["value"][0][0] == "the base"
    result = {"way": "grid", "points": POINTS, "best": POINTS[2], "budget": 1, "words": EVIL}
    _, sentence, _, table = show_found(a_run(tmp_path / "done", "search", result=result))
    assert "<img" not in sentence and "wb-good" in sentence and table["value"][3][-1] == "over"
    assert table["headers"] == [
        "weights",
        "change of 'cheerful'",
        "general loss",
        "score",
        "budget",
    ]


def test_names_are_never_markup_in_the_charts() -> None:
    strange = {**point(1, **{EVIL: 1.0}), "changes": {EVIL: 1.0}}
    rows = [{"state": EVIL, "value": 1.0}]
    for figure in (
        coefficients({"way": "together", "points": [strange], "best": strange}),
        coefficients({"way": "each", "points": [strange]}),
        measurements({"measured": rows, "test": {"words": EVIL, "threshold": 0.5}}),
    ):
        assert EVIL not in json.dumps(json.loads(figure.to_json())) and figure.data


def test_a_search_that_found_nothing_warns(tmp_path: Path) -> None:
    result = {"way": "grid", "points": POINTS, "best": POINTS[0], "budget": 1, "words": "None."}
    view = a_run(tmp_path / "none", "search", result={**result, "best": {**POINTS[0], "terms": ""}})
    assert "wb-warn" in show_found(view)[1]
    doubtful = {**result, "best": POINTS[2], "confirmed": {"cheerful": {"holds": False}}}
    assert "wb-warn" in show_found(a_run(tmp_path / "doubt", "search", result=doubtful))[1]
    assert show(view)[-1]["visible"] is False, "the base is nothing to keep"


def test_a_bisection_is_shown(tmp_path: Path) -> None:
    rows = [{"state": "t@1", "value": 1.0}, {"state": "t@4", "value": 3.0}]
    test = {"threshold": 2.0, "words": "the general loss"}
    view = a_run(tmp_path / "b", "bisect", result={"measured": rows, "test": test, "words": "It."})
    whole, sentence, chart, table = show_found(view)
    assert whole["visible"] and "It." in sentence
    assert list(chart.data[0].y) == [1.0, 3.0] and chart.layout.shapes[0].y0 == 2.0
    assert table["value"] == [["t@1", "1"], ["t@4", "3"]]
    assert not measurements({}).data


def test_other_runs_and_other_versions_show_nothing(tmp_path: Path) -> None:
    odd = a_run(tmp_path / "odd", "search", result={"points": [{"odd": 1}]})
    for view in (None, a_run(tmp_path / "x", "train", result={"words": "x"}), odd):
        whole, *_ = show_found(view)
        assert whole["visible"] is False
