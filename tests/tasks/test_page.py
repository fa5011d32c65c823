"""The page on merging says what the registry says."""

from __future__ import annotations

from pathlib import Path

from vectors.tasks import METHODS
from vectors.tasks.page import merging_page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "merging.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == merging_page(), (
        "Make it again: python -m vectors.tasks.page > docs/merging.md"
    )


def test_the_page_names_every_option() -> None:
    page = merging_page()
    for method in METHODS.values():
        section = page.split(f"\n## {method.name}\n")[1].split("\n## ")[0]
        for option, field in method.parameters.model_fields.items():
            assert f"| `{option}` |" in section
            assert (field.description or "none") in section
