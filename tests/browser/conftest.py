"""The page on the tiny model, shared by the tests that walk it and those that look at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_url(tiny_home: Path) -> Iterator[str]:
    """Where the page on the tiny model answers; it starts its own engine."""
    from tests_support.browser import served

    with served(tiny_home, "--model", "tiny") as address:
        yield address
