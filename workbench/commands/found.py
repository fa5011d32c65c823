"""How a search and a bisection look in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from workbench.commands.show import lines, span

__all__ = ["draw_bisect", "draw_search"]

Result = Mapping[str, Any]


def draw_search(out: Console, r: Result) -> None:
    """Draw every point, the best one, and where it is kept."""
    names = [row["name"] for row in r["behaviours"]]
    rows = [
        {
            "mark": "best" if point == r["best"] else "" if point["within"] else "over budget",
            "terms": point["terms"] or "(the base)",
            **{f"change {name}": point["changes"][name] for name in names},
            "forgetting": point["forgetting"],
            "score": point["score"],
        }
        for point in r["points"]
    ]
    titles = {"terms": "weights", **{f"change {name}": name for name in names}}
    titles |= {"forgetting": "general loss", "score": "score", "mark": ""}
    out.print(lines(rows, titles))
    out.print(
        f"Margins and general loss (nats; a token) as changes from the base, in {span(r['seconds'])}; "
        "the score is in deviations of the base's margins, on half of the pairs."
    )
    out.print(r["words"], style="bold", soft_wrap=True)
    if r["kept"]:
        kept = f"{r['kept']['name']}@{r['kept']['revision']}"
        out.print(f"Kept as {kept}. Try: --with {r['kept']['name']}=1")


def draw_bisect(out: Console, r: Result) -> None:
    """Draw what was measured, and the sentence."""
    out.print(lines(r["measured"], {"state": "measured", "value": r["test"]["words"]}))
    out.print(
        f"{len(r['measured'])} measurements in {span(r['seconds'])}; bad is {r['bad_is']} "
        f"{r['test']['threshold']:.4g} nats."
    )
    out.print(r["words"], style="bold", soft_wrap=True)
