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
    """The models stay where they are; library, runs and engines are deleted with the home."""
    models = Home.default().models
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "models").symlink_to(models)
        os.environ["WORKBENCH_HOME"] = folder
        with Workbench(home=folder) as workbench:
            yield workbench
