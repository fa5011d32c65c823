"""The report of `workbench gradients`: one HTML file with its plots inside."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from workbench.train.claims import layer_table

__all__ = ["flow_report", "table_rows"]

COLOURS = {"context": "#d98200", "decision": "#3b82c4", "frozen": "#12946c"}
HEIGHT, BAR, DECADES = 120, 7, 6
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .7rem;text-align:right;"
    "border-bottom:1px solid #ccc}td:first-child,th:first-child{text-align:left}"
)


def table_rows(weights: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each class of weight: from which positions its gradient comes, over all layers.

    Matrices only; norms are summed over the layers as squares. `silent` counts the layers in which
    context positions contribute nothing at all.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for weight in weights:
        if weight["context"] is not None and weight["layer"] is not None:
            found.setdefault(_short(weight["name"]), []).append(weight)
    return [
        {
            "weight": name,
            "context": math.hypot(*(row["context"] for row in rows)),
            "decision": math.hypot(*(row["decision"] for row in rows)),
            "frozen": math.hypot(*(row["frozen"] for row in rows)),
            "layers": len(rows),
            "silent": sum(row["context"] == 0 for row in rows),
        }
        for name, rows in found.items()
    ]


def flow_report(result: Mapping[str, Any]) -> str:
    """Return the page for the result of a run of `gradients`."""
    parts = [
        f"<h1>Where the gradient flows: {html.escape(result['model'])}</h1>",
        f"<p>{result['decisions']} decisions, cross-entropy of their tokens. <b>Context</b> and "
        "<b>decision</b> are what positions of each contribute to a weight's gradient in ordinary "
        "training; <b>frozen</b> is the gradient with the context frozen. Norms.</p>",
        _table(table_rows(result["weights"])),
        "<h2>What is said, and what was measured</h2>",
        _table([_verdict(claim) for claim in result["claims"]]),
        "<h2>Layer by layer</h2><p>Share of each matrix' gradient that context positions give, "
        "<code>context / (context + decision)</code>, in the attention layers.</p>",
        _table([_shares(row) for row in layer_table(result["weights"])]),
        "<p>Norms of all matrices, logarithmic; a missing bar is exactly nothing or lies more than "
        f"{DECADES} decades below the largest.</p>",
        *_plots(result["weights"]),
        "<h2>Recurrent against attention layers</h2><p>Shares among the mixers of both kinds. The "
        "share of layers is what indifference would give.</p>",
        _table([{"share of": name, **row} for name, row in result["shares"].items()]),
        "<h2>Memory</h2><p>Peak of one forward and backward pass of the longest decision.</p>",
        _table([{"tier": t, "MiB": size / 2**20} for t, size in result["memory"].items()]),
    ]
    if result["task"]:
        parts += [f"<h2>What training '{html.escape(result['task'])}' moved</h2>"]
        parts += [_table([_without_heads(row) for row in result[k]]) for k in ("decay", "states")]
        if not result["decay"]:
            parts.append("<p>The model has no recurrent layers.</p>")
    return f"<!doctype html><meta charset=utf-8><title>Gradients</title><style>{STYLE}</style>" + (
        "".join(parts)
    )


def _verdict(claim: Mapping[str, Any]) -> dict[str, str]:
    words = {True: "holds", False: "does not hold", None: "cannot be told"}
    return {
        "said": claim["says"],
        "measured": claim["measured"],
        "verdict": words[claim["holds"]],
    }


def _shares(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v if k == "layer" else f"{v:.1%}" if v else "none" for k, v in row.items()}


def _without_heads(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "heads"}


def _plots(weights: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(_short(w["name"]) for w in weights if w["layer"] is not None)
    found = []
    for name in names:
        rows = [w for w in weights if _short(w["name"]) == name and w["layer"] is not None]
        if any(row["context"] is not None for row in rows):
            found.append(f"<h3>{html.escape(name)}</h3>{_bars(rows)}")
    return found


def _bars(rows: Sequence[Mapping[str, Any]]) -> str:
    values = [row[key] for row in rows for key in COLOURS if row[key]]
    top = max(values, default=1.0)
    shapes = []
    group = BAR * (len(COLOURS) + 1)
    for place, row in enumerate(rows):
        for number, (key, colour) in enumerate(COLOURS.items()):
            value = row[key] or 0.0
            share = 1 + math.log10(value / top) / DECADES if value > 0 else 0.0
            if share > 0:
                height = share * HEIGHT
                shapes.append(
                    f"<rect x={place * group + number * BAR} y={HEIGHT - height:.1f} width={BAR - 1} "
                    f"height={height:.1f} fill='{colour}'><title>layer {row['layer']}, {key}: "
                    f"{value:.3g}</title></rect>"
                )
        shapes.append(f"<text x={place * group} y={HEIGHT + 14} font-size=10>{row['layer']}</text>")
    legend = " ".join(f"<span style='color:{c}'>&#9632; {k}</span>" for k, c in COLOURS.items())
    width = len(rows) * group
    return f"<div>{legend}</div><svg width={width} height={HEIGHT + 20}>{''.join(shapes)}</svg>"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(str(key))}</th>" for key in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_text(v))}</td>" for v in row.values()) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _short(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[-2:]) if len(parts) > 1 else parts[0]
