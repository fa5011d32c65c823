"""The curve that rises and falls again: margin and general loss over a task vector's coefficient.

    workbench bench coefficients [--json] [--task cheerful-baked] [--behaviour cheerful]
        [--points=-1,-0.5,0.5,1,1.5,2,2.5,3,4] [--run RUN] [--figure FILE.svg]

Searches in the home in use, where `workbench extract --contrast cheerful --name cheerful`, `verify` and
`train --vector cheerful --name cheerful-baked` ran before. `--run` takes the numbers of a search that is
done instead of searching again. `--figure` draws the page's own chart; it needs the page's extra, and
Chromium with playwright.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _results import RESULTS, publish

from vectors.errors import WorkbenchError
from workbench.service import Workbench

POINTS = "-1,-0.5,0.5,1,1.5,2,2.5,3,4"
WIDTH, HEIGHT = 860, 540
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DRAW = f"""async (figure) => {{
  const place = document.createElement("div");
  document.body.append(place);
  await Plotly.newPlot(place, figure.data, figure.layout);
  return await Plotly.toImage(place, {{ format: "svg", width: {WIDTH}, height: {HEIGHT} }});
}}"""


def main() -> None:
    """Search or read, print, append to the results file, and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--task", default="cheerful-baked", help="a task vector or recipe")
    parser.add_argument("--behaviour", default="cheerful", help="the contrast set that judges")
    parser.add_argument("--points", default=POINTS, help="coefficients, by commas")
    parser.add_argument("--run", default="", help="a search that is done, of 'workbench runs list'")
    parser.add_argument("--figure", type=Path, help="an SVG file to draw")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to append to")
    asked = parser.parse_args()
    try:
        found = searched(asked)
    except (WorkbenchError, ValueError) as error:
        parser.error(str(error))
    numbers = summary(found)
    if asked.json:
        print(json.dumps(numbers))
    else:
        show(numbers)
    publish("coefficients", numbers, as_json=asked.json, results=asked.results, shown=True)
    if asked.figure:
        draw(found, asked.figure)


def searched(asked: argparse.Namespace) -> dict[str, Any]:
    """The result of the search that was asked for."""
    with Workbench() as workbench:
        if asked.run:
            return workbench.runs.follow(asked.run).result()
        points = [float(text) for text in asked.points.split(",")]
        return workbench.search(asked.task, [asked.behaviour], coefficients=points)


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers that the documentation has: a row a point, and what was chosen."""
    rows = [
        {
            "coefficient": next(iter(point["coefficients"].values())),
            "margin": next(iter(point["margins"].values())),
            "change": next(iter(point["changes"].values())),
            "general_loss": point["forgetting"],
            "within_budget": point["within"],
        }
        for point in found["points"]
    ]
    return {
        "recipe": found["recipe"],
        "model": found["model"],
        "behaviours": found["behaviours"],
        "budget": found["budget"],
        "points": sorted(rows, key=lambda row: row["coefficient"]),
        "best": found["best"]["coefficients"],
        "confirmed": found["confirmed"],
        "seconds": round(found["seconds"]),
    }


def show(numbers: Mapping[str, Any]) -> None:
    """Print a line a point."""
    print("coefficient  margin  change  general loss")
    for row in numbers["points"]:
        over = "" if row["within_budget"] else "  over the budget"
        print(
            f"{row['coefficient']:11g}  {row['margin']:6.2f}  {row['change']:+6.2f}  "
            f"{row['general_loss']:12.4f}{over}"
        )
    print(f"best within the budget of {numbers['budget']:g}: {numbers['best']}")
    print(f"on the pairs that did not choose: {numbers['confirmed']}")


def draw(found: Mapping[str, Any], file: Path) -> None:
    """Write the page's chart of the search as an SVG file, on white."""
    from playwright.sync_api import sync_playwright
    from plotly.offline import get_plotlyjs

    from ui.curves import coefficients

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"There is no Chromium to draw with; install one of {', '.join(BROWSERS)}.")
    figure = coefficients(found)
    figure.update_layout(paper_bgcolor="white", plot_bgcolor="white", height=HEIGHT)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page()
        page.add_script_tag(content=get_plotlyjs())
        address = page.evaluate(DRAW, json.loads(figure.to_json()))
        chromium.close()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(urllib.parse.unquote(address.partition(",")[2]), "utf-8")


if __name__ == "__main__":
    main()
