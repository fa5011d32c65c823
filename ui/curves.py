"""Charts of a search over coefficients and of a bisection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ui.charts import BLUE, GREEN, GREY, ORANGE, RED, plain, styled

__all__ = ["coefficients", "measurements"]

Rows = Sequence[Mapping[str, Any]]
LOOKS = (
    (BLUE, "solid", "circle"),
    (ORANGE, "dash", "square"),
    (GREEN, "dot", "diamond"),
    (RED, "dashdot", "cross"),
    (GREY, "longdash", "x"),
)
Line = tuple[str, list[float], list[float], list[float]]


def coefficients(result: Mapping[str, Any]) -> go.Figure:
    """What the coefficients do to the behaviours, above what they do to ordinary text.

    One coefficient for all gives a curve for each behaviour. Where ingredients have coefficients of
    their own, each has a curve of the best score that was found at each of its values.
    """
    points: Rows = result.get("points", [])
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, row_heights=[0.66, 0.34], vertical_spacing=0.08
    )
    together = result.get("way") == "together"
    lines = _by_behaviour(points) if together else _by_ingredient(points)
    for number, (name, x, y, general) in enumerate(lines):
        colour, dash, mark = LOOKS[number % len(LOOKS)]
        for panel, values, label in ((1, y, name), (2, general, f"general loss, {name}")):
            if panel == 1 or not together or number == 0:
                figure.add_scatter(
                    x=x,
                    y=values,
                    name="general loss" if together and panel == 2 else label,
                    mode="lines+markers",
                    line={"color": GREY if together and panel == 2 else colour, "dash": dash},
                    marker={"symbol": mark, "size": 7},
                    row=panel,
                    col=1,
                )
    if points and result.get("best"):
        _mark(figure, result["best"], together)
    if points and result.get("budget") is not None:
        figure.add_hline(
            y=result["budget"],
            line={"color": RED, "dash": "dash"},
            annotation_text="budget",
            row=2,  # type: ignore[arg-type]  # the stub says "all" only
            col=1,  # type: ignore[arg-type]
        )
    if together and result.get("best"):
        figure.add_vline(
            x=_shared(result["best"]), line={"color": GREEN, "dash": "dashdot"},
            annotation_text="best", row=1, col=1,  # type: ignore[arg-type]
        )  # fmt: skip
    words = "change of the margin (nats)" if together else "best score"
    figure.update_yaxes(title_text=words, row=1, col=1)
    figure.update_yaxes(title_text="general loss (nats)", rangemode="tozero", row=2, col=1)
    figure.update_xaxes(title_text="coefficient", row=2, col=1)
    return styled(figure, 520, "" if points else "No measurements yet")


def _mark(figure: go.Figure, best: Mapping[str, Any], together: bool) -> None:
    """A star on each curve where the best point is."""
    named = best["changes"] if together else best["coefficients"]
    figure.add_scatter(
        x=[_shared(best) if together else best["coefficients"][name] for name in named],
        y=[best["changes"][name] if together else best["score"] for name in named],
        name="best",
        mode="markers",
        marker={"symbol": "star", "size": 15, "color": GREEN, "line": {"width": 1}},
        row=1,
        col=1,
    )


def _shared(point: Mapping[str, Any]) -> float:
    return next(iter(point["coefficients"].values()))


def _by_behaviour(points: Rows) -> list[Line]:
    rows = sorted(points, key=_shared)
    x, general = [_shared(row) for row in rows], [row["forgetting"] for row in rows]
    names = rows[0]["changes"] if rows else ()
    return [
        (f"'{plain(name)}'", x, [row["changes"][name] for row in rows], general) for name in names
    ]


def _by_ingredient(points: Rows) -> list[Line]:
    lines: list[Line] = []
    for name in points[0]["coefficients"] if points else ():
        best: dict[float, Mapping[str, Any]] = {}
        for row in points:
            at = row["coefficients"][name]
            if at not in best or row["score"] > best[at]["score"]:
                best[at] = row
        x = sorted(best)
        scores, general = [best[c]["score"] for c in x], [best[c]["forgetting"] for c in x]
        lines.append((plain(name), x, scores, general))
    return lines


def measurements(result: Mapping[str, Any]) -> go.Figure:
    """What a bisection measured, in the order in which it did, and the threshold."""
    rows: Rows = result.get("measured", [])
    figure = go.Figure()
    if rows:
        figure.add_scatter(
            x=[plain(row["state"]) for row in rows],
            y=[row["value"] for row in rows],
            mode="markers",
            marker={"color": BLUE, "size": 11},
            name="measured",
        )
    test = result.get("test") or {}
    if rows and test.get("threshold") is not None:
        figure.add_hline(
            y=test["threshold"], line={"color": RED, "dash": "dash"}, annotation_text="threshold"
        )
    figure.update_yaxes(title_text=f"{plain(test.get('words', 'measured'), 80)} (nats)")
    figure.update_xaxes(title_text="in the order of measuring", type="category")
    return styled(figure, 380, "" if rows else "No measurements yet")
