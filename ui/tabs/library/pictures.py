"""The tab's pictures: lineage, what differs between two entries, and interference.

Names and everything else from an entry go through `plain` first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ui.charts import BLUE, GREEN, GREY, ORANGE, RED, plain, styled
from ui.markup import number, when

__all__ = ["differences", "interference", "lineage", "table_of"]

Row = Mapping[str, Any]
NO_NAME, RUNS = "no name any more", "runs"
LOOKS = {
    "steering-vector": (BLUE, "circle"),
    "task-vector": (GREEN, "square"),
    "recipe": (ORANGE, "diamond"),
    "run": (GREY, "triangle-up"),
}
LINKS = {
    "made of": (GREEN, "solid", 2),
    "next revision": (GREY, "solid", 1),
    "made by": (GREY, "dot", 1.5),
    "measured by": (GREY, "dash", 1),
}
MEASURES = (
    ("cosine", "cosine of the changes", "RdBu", -1),
    ("conflict", "sign conflict", "Oranges", 0),
    ("overlap", "overlap of the largest", "Blues", 0),
)


def lineage(found: Row) -> go.Figure:
    """Names as lanes, time from left to right, and lines from what a thing is made of to it."""
    figure = go.Figure()
    dots = _dots(found)
    lanes = list(dict.fromkeys(dot["lane"] for dot in dots if dot["lane"] != RUNS))
    lanes += [RUNS] if found["runs"] else []
    height = {lane: -row for row, lane in enumerate(lanes)}
    at = {dot["key"]: (x, height[dot["lane"]]) for x, dot in enumerate(dots)}
    for how, (colour, dash, width) in LINKS.items():
        ends = [(at[k["source"]], at[k["target"]]) for k in found["links"] if k["how"] == how]
        if ends:
            figure.add_scatter(
                x=[x for a, b in ends for x in (a[0], b[0], None)],
                y=[y for a, b in ends for y in (a[1], b[1], None)],
                name=how,
                mode="lines",
                line={"color": colour, "dash": dash, "width": width},
                hoverinfo="skip",
            )
    weights = [k for k in found["links"] if k["weight"] is not None]
    for link in weights:
        (x0, y0), (x1, y1) = at[link["source"]], at[link["target"]]
        figure.add_annotation(
            x=(x0 + x1) / 2,
            y=(y0 + y1) / 2,
            text=f"x {link['weight']:g}",
            showarrow=False,
            yshift=10,
        )
    for kind in dict.fromkeys(dot["kind"] for dot in dots):
        mine = [dot for dot in dots if dot["kind"] == kind]
        colour, mark = LOOKS.get(kind, (RED, "x"))
        figure.add_scatter(
            x=[at[dot["key"]][0] for dot in mine],
            y=[at[dot["key"]][1] for dot in mine],
            name=plain(kind or "not in this library"),
            mode="markers+text",
            marker={
                "color": colour,
                "symbol": mark,
                "size": [20 if dot["key"] == found["entry"] else 13 for dot in mine],
            },
            text=[plain(dot["label"]) for dot in mine],
            textposition="bottom center",
            hovertext=[plain(dot["words"], 200) for dot in mine],
            hoverinfo="text",
        )
    figure.update_xaxes(visible=False, range=[-0.7, max(len(dots) - 0.3, 1)])
    figure.update_yaxes(
        tickvals=[height[lane] for lane in lanes],
        ticktext=[plain(lane) for lane in lanes],
        range=[0.7 - len(lanes) - 0.5, 0.7],
        zeroline=False,
    )
    return styled(figure, min(900, 190 + 56 * len(lanes)), "" if dots else "Nothing to draw")


def _dots(found: Row) -> list[dict[str, Any]]:
    """Entries and runs, the oldest first."""
    dots = [
        {
            "key": place["key"],
            "lane": place["name"] if place["revision"] else NO_NAME,
            "kind": place["kind"],
            "label": f"@{place['revision']}" if place["revision"] else place["digest"][:8],
            "words": f"{place['key']}, {place['kind'] or 'not here'}, {place['digest'][:12]}, "
            f"{when(place['created'])}",
            "time": datetime.fromisoformat(place["created"]).timestamp() if place["created"] else 0,
        }
        for place in found["places"]
    ]
    dots += [
        {
            "key": run["id"],
            "lane": RUNS,
            "kind": "run",
            "label": run["kind"],
            "words": f"{run['id']}, {when(run['asked_at'])}",
            "time": run["asked_at"],
        }
        for run in found["runs"]
    ]
    return sorted(dots, key=lambda dot: dot["time"])


def differences(found: Row) -> go.Figure:
    """What differs: by block for steering vectors, by term for recipes, else by layer."""
    figure = go.Figure()
    old, new = (plain(name) for name in found["names"])
    if found["blocks"]:
        rows = found["blocks"]
        figure.add_scatter(
            x=[row["block"] for row in rows],
            y=[row["cosine"] for row in rows],
            name="cosine of the directions",
            mode="lines+markers",
            line={"color": BLUE, "width": 2},
        )
        figure.update_xaxes(title_text="block", dtick=None if len(rows) > 16 else 1)
        figure.update_yaxes(title_text="cosine", range=[-1.05, 1.05])
        return styled(figure, 340)
    rows = found["terms"] or found["layers"]
    keys = ("old", "new") if found["terms"] else ("old_norm", "new_norm")
    places = [plain(row.get("name", row.get("layer"))) for row in rows]
    for key, name, colour, pattern in ((keys[0], old, GREY, "/"), (keys[1], new, BLUE, "")):
        if rows:
            figure.add_bar(
                x=places,
                y=[row[key] for row in rows],
                name=name,
                marker={"color": colour, "pattern": {"shape": pattern}},
            )
    if rows and not found["terms"]:
        known = [(p, r["least"], r["most"]) for p, r in zip(places, rows, strict=True)]
        known = [(place, low, high) for place, low, high in known if low is not None]
        figure.add_scatter(
            x=[place for place, _, _ in known],
            y=[(low + high) / 2 for _, low, high in known],
            error_y={"type": "data", "array": [(high - low) / 2 for _, low, high in known]},
            name="apart, from at least to at most",
            mode="markers",
            marker={"color": RED, "symbol": "line-ew-open", "size": 8},
        )
    figure.update_xaxes(title_text="task vector" if found["terms"] else "layer", type="category")
    figure.update_yaxes(title_text="weight" if found["terms"] else "norm of the change")
    return styled(figure, 340, "" if rows else "No weight differs")


def interference(found: Row) -> go.Figure:
    """A heat map for each measure: pairs of task vectors down, layers across."""
    layers: Mapping[str, Sequence[Row]] = {**found["layers"], "all": found["whole"]}
    pairs = [f"{plain(p['first'], 24)} and {plain(p['second'], 24)}" for p in found["whole"]]
    figure = make_subplots(
        rows=3,
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.12,
        subplot_titles=[title for _, title, _, _ in MEASURES],
    )
    for row, (key, title, colours, low) in enumerate(MEASURES, 1):
        figure.add_heatmap(
            x=[plain(layer) for layer in layers],
            y=pairs,
            z=[[layers[layer][i][key] for layer in layers] for i in range(len(pairs))],
            colorscale=colours,
            zmin=low,
            zmax=1,
            xgap=1,
            ygap=1,
            hovertemplate=f"%{{y}}<br>layer %{{x}}<br>{title} %{{z:.3f}}<extra></extra>",
            colorbar={"len": 0.3, "y": 1 - (row - 0.5) / 3, "thickness": 12},
            row=row,
            col=1,
        )
    figure.update_xaxes(type="category")
    figure.update_xaxes(title_text="layer", row=3, col=1)
    return styled(figure, 230 + 3 * (50 + 24 * len(pairs)))


def table_of(found: Row) -> list[list[str]]:
    """What `interference` draws, as rows."""
    places = [("all", found["whole"]), *found["layers"].items()]
    return [
        [layer, p["first"], p["second"], *(number(p[key]) for key, _, _, _ in MEASURES)]
        for layer, pairs in places
        for p in pairs
    ]
