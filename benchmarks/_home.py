"""A workbench of a benchmark's own, on the models of the person's."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workbench.service import Workbench
from workbench.settings import Home


@contextmanager
def own_workbench() -> Iterator[Workbench]:
    """Models, and what engines have compiled, stay where they are; library, runs and engines are
    deleted with the home."""
    home = Home.default()
    cache = home.engines / "cache"
    cache.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "models").symlink_to(home.models)
        (Path(folder) / "engines").mkdir()
        (Path(folder) / "engines" / "cache").symlink_to(cache)
        os.environ["WORKBENCH_HOME"] = folder
        with Workbench(home=folder) as workbench:
            yield workbench
