"""The page's charts. Colours are never the only difference: dashes and marks differ as well."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "ORANGE",
    "RED",
    "doses",
    "learning",
    "plain",
    "separation",
    "styled",
]

BLUE, ORANGE, GREEN, RED, GREY = "#3b82c4", "#d98200", "#12946c", "#d1495b", "#8a8f98"
GRID = "rgba(128,128,128,0.25)"
MOST_POINTS = 1500
LONGEST = 40

Rows = Sequence[Mapping[str, Any]]


def styled(figure: go.Figure, height: int, empty: str = "") -> go.Figure:
    """Give a figure the page's look; `empty` is what one without data says."""
    figure.update_layout(
        height=height,
        margin={"l": 60, "r": 20, "t": 40, "b": 50},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        hovermode="closest",
    )
    figure.update_xaxes(gridcolor=GRID, zerolinecolor=GRID, automargin=True)
    figure.update_yaxes(gridcolor=GRID, zerolinecolor=GRID, automargin=True)
    if empty:
        figure.add_annotation(text=empty, showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper")
    return figure


def plain(text: object, most: int = LONGEST) -> str:
    """Text that Plotly, which reads tags in its labels, shows as it is."""
    words = str(text)
    short = words if len(words) <= most else f"{words[: most - 1]}…"
    return html.escape(short, quote=False).replace("$", "&#36;")


def _column(rows: Rows, name: str) -> list[Any]:
    return [row.get(name) for row in rows]


def separation(blocks: Rows, best: int | None) -> go.Figure:
    """How well each block tells the two sides of the held-out pairs apart."""
    figure = go.Figure()
    rows = sorted(blocks, key=lambda row: row["block"])
    lines = (
        ("auroc", "AUROC", BLUE, "solid", "circle"),
        ("pair_accuracy", "pair accuracy", ORANGE, "dash", "square"),
        ("agreement", "agreement", GREEN, "dot", "diamond"),
    )
    for key, label, colour, dash, mark in lines if rows else ():
        figure.add_scatter(
            x=_column(rows, "block"),
            y=_column(rows, key),
            name=label,
            mode="lines+markers",
            line={"color": colour, "dash": dash, "width": 2},
            marker={"symbol": mark, "size": 6},
        )
    if rows and best is not None:
        figure.add_vline(
            x=best,
            line={"color": GREY, "dash": "dashdot"},
            annotation_text=f"best block {best}",
            annotation_position="top",
        )
    figure.update_xaxes(title_text="block", dtick=None if len(rows) > 16 else 1)
    figure.update_yaxes(title_text="separation of held-out pairs", rangemode="tozero")
    return styled(figure, 360, "" if rows else "No measurements yet")


def doses(result: Mapping[str, Any]) -> go.Figure:
    """Margin and side effect over the dose, beside the controls."""
    rows = sorted(result.get("doses", []), key=lambda row: row["dose"])
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, row_heights=[0.66, 0.34], vertical_spacing=0.08
    )
    if rows:
        _margins(figure, rows)
        _controls(figure, result)
        _side_effects(figure, rows, result.get("kl_budget"))
        _marks(figure, result)
    figure.update_yaxes(title_text="margin (nats)", row=1, col=1)
    figure.update_yaxes(title_text="KL (nats a token)", rangemode="tozero", row=2, col=1)
    figure.update_xaxes(title_text="dose", row=2, col=1)
    return styled(figure, 560, "" if rows else "No measurements yet")


def _margins(figure: go.Figure, rows: Rows) -> None:
    x = _column(rows, "dose")
    figure.add_scatter(
        x=[*x, *reversed(x)],
        y=[*_column(rows, "high"), *reversed(_column(rows, "low"))],
        mode="lines",
        fill="toself",
        fillcolor="rgba(59,130,196,0.2)",
        line={"width": 0},
        hoverinfo="skip",
        name="95 % interval",
        row=1,
        col=1,
    )
    figure.add_scatter(
        x=x,
        y=_column(rows, "margin"),
        name="margin",
        mode="lines+markers",
        line={"color": BLUE, "width": 2},
        row=1,
        col=1,
    )


def _controls(figure: go.Figure, result: Mapping[str, Any]) -> None:
    base, prompt = result.get("base_margin"), result.get("prompt") or {}
    levels = (
        (base, "no steering", GREY, "dash"),
        (prompt.get("margin"), "asking in the prompt", GREEN, "dot"),
    )
    ends = [row["dose"] for row in result["doses"]]
    for value, label, colour, dash in levels:
        if value is not None:
            figure.add_scatter(
                x=[min(ends), max(ends)],
                y=[value, value],
                name=label,
                mode="lines",
                line={"color": colour, "dash": dash, "width": 2},
                row=1,
                col=1,
            )
    at, random = result.get("random_dose"), result.get("random") or []
    if random and at is not None and base is not None:
        figure.add_scatter(
            x=[at] * len(random),
            y=[base + row["change"] for row in random],
            name="random directions",
            mode="markers",
            marker={"color": GREY, "symbol": "x-thin-open", "size": 9, "line": {"width": 2}},
            row=1,
            col=1,
        )


def _side_effects(figure: go.Figure, rows: Rows, budget: float | None) -> None:
    x = _column(rows, "dose")
    for key, label, dash, mark in (
        ("kl", "KL, mean", "solid", "square"),
        ("kl_p95", "KL, 95th percentile", "dot", "diamond"),
    ):
        figure.add_scatter(
            x=x,
            y=_column(rows, key),
            name=label,
            mode="lines+markers",
            line={"color": ORANGE, "dash": dash, "width": 2},
            marker={"symbol": mark, "size": 6},
            row=2,
            col=1,
        )
    if budget is not None:
        figure.add_scatter(
            x=[min(x), max(x)],
            y=[budget, budget],
            name="KL budget",
            mode="lines",
            line={"color": RED, "dash": "dash", "width": 2},
            row=2,
            col=1,
        )


def _marks(figure: go.Figure, result: Mapping[str, Any]) -> None:
    for key, label, colour in (
        ("working_dose", "working dose", GREEN),
        ("break_dose", "text breaks", RED),
    ):
        if result.get(key) is not None:
            figure.add_vline(
                x=result[key],
                line={"color": colour, "dash": "dashdot", "width": 1.5},
                annotation_text=label,
                annotation_position="bottom right",
                row=1,  # type: ignore[arg-type]  # the stub says "all" only
                col=1,  # type: ignore[arg-type]
            )


def learning(events: Rows) -> go.Figure:
    """Loss and gradient norm over the steps of a training run."""
    steps = [row for row in events if row.get("kind") == "step"]
    held = [row for row in events if row.get("kind") == "held_out"]
    steps = steps[:: max(1, -(-len(steps) // MOST_POINTS))]
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, row_heights=[0.66, 0.34], vertical_spacing=0.08
    )
    lines = (
        (steps, "loss", "loss", BLUE, "solid", "lines", 1),
        (held, "loss", "held-out loss", ORANGE, "dash", "lines+markers", 1),
        (held, "general", "loss on ordinary text", GREEN, "dot", "lines+markers", 1),
        (steps, "gradient_norm", "gradient norm", GREY, "solid", "lines", 2),
    )
    for rows, key, label, colour, dash, mode, panel in lines:
        if any(row.get(key) is not None for row in rows):
            figure.add_scatter(
                x=_column(rows, "step"),
                y=_column(rows, key),
                name=label,
                mode=mode,
                line={"color": colour, "dash": dash, "width": 2},
                row=panel,
                col=1,
            )
    figure.update_yaxes(title_text="loss (nats)", row=1, col=1)
    figure.update_yaxes(title_text="gradient norm", rangemode="tozero", row=2, col=1)
    figure.update_xaxes(dtick=1 if len(steps) <= 16 else None)
    figure.update_xaxes(title_text="step", row=2, col=1)
    return styled(figure, 480, "" if steps or held else "No measurements yet")
