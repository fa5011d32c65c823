"""What a search over coefficients or a bisection found: sentence, chart, table."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ui.curves import coefficients, measurements
from ui.markup import note, number
from vectors.errors import WorkbenchError

__all__ = ["lay_found", "show_found"]

MOST_ROWS = 400


def lay_found(place: str) -> list[Any]:
    """Lay the parts out; they come back in the order in which `show_found` fills them.

    Args:
        place: what the parts' ids start with.
    """
    with gr.Column(visible=False, elem_id=f"{place}-found") as whole:
        sentence = gr.HTML(elem_id=f"{place}-sentence")
        chart = gr.Plot(label="What was measured", elem_id=f"{place}-chart")
        with gr.Accordion("The same as a table", open=False, elem_id=f"{place}-twin"):
            table = gr.Dataframe(
                interactive=False, datatype="str", max_height=320, elem_id=f"{place}-points"
            )
    return [whole, sentence, chart, table]


def show_found(view: Any) -> tuple[Any, ...]:
    """The run's own values, also while it is under way; nothing for runs of other kinds."""
    nothing = (gr.update(visible=False), "", None, gr.update(value=[]))
    if view is None or view.kind not in ("search", "bisect"):
        return nothing
    draw = _search if view.kind == "search" else _bisect
    try:
        found = view.result()
        sentence, chart, headers, rows = draw(view, found)
    except (WorkbenchError, KeyError, TypeError, ValueError):
        return nothing  # a record of another version
    return (
        gr.update(visible=bool(rows)),
        note(sentence, "good" if _is_sure(found) else "warn"),
        chart,
        gr.update(headers=headers, value=rows[:MOST_ROWS]),
    )


def _is_sure(found: dict[str, Any]) -> bool:
    """Whether a search chose something, and the pairs that did not choose agree."""
    confirmed = found.get("confirmed", {}).values()
    agreed = all(row.get("holds", True) for row in confirmed)
    return agreed and found.get("best", {}).get("terms") != ""


def _search(view: Any, found: dict[str, Any]) -> tuple[Any, ...]:
    if not found:
        points = [event for event in view.events() if event.get("kind") == "point"]
        found = {"points": points, **view.record.parameters}
    points = found["points"]
    names = list(points[0]["changes"]) if points else []
    headers = ["weights", *(f"change of '{n}'" for n in names), "general loss", "score", "budget"]
    rows = [
        [
            point["terms"] or "the base",
            *(number(point["changes"][name]) for name in names),
            number(point["forgetting"]),
            number(point["score"]),
            "within" if point["within"] else "over",
        ]
        for point in points
    ]
    return found.get("words", ""), coefficients(found), headers, rows


def _bisect(view: Any, found: dict[str, Any]) -> tuple[Any, ...]:
    if not found:
        rows = [event for event in view.events() if event.get("kind") == "measured"]
        found = {"measured": rows}
    rows = [[row["state"], number(row["value"])] for row in found["measured"]]
    return found.get("words", ""), measurements(found), ["measured", "value"], rows
