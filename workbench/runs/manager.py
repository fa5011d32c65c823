"""Start runs, list them, follow them, cancel them; each is a process of its own."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from vectors.errors import Cancelled, NameNotFound, OutOfSpace, RunFailed, error_named
from workbench.runs.record import RunRecord, RunView, read_run, write_json
from workbench.settings import Home

__all__ = ["Runs"]

Watch = Callable[[RunView], None]


class Runs:
    """The runs of one home."""

    def __init__(self, home: Home) -> None:
        self.home = home

    def start(self, kind: str, parameters: dict[str, Any]) -> RunView:
        """Start a run, or return the one that does exactly this already.

        Raises:
            OutOfSpace: its folder cannot be written.
        """
        with FileLock(self.home.runs / ".start.lock"):
            for view in self.list():
                same = view.kind == kind and view.record.parameters == parameters
                if same and not view.ended:
                    return view
            run_id = f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
            folder = self.home.runs / run_id
            record = RunRecord(id=run_id, kind=kind, parameters=parameters, asked_at=time.time())
            try:
                folder.mkdir()
                write_json(folder / "run.json", record.model_dump())
                log = open(folder / "log.txt", "w")  # noqa: SIM115  # inherited by the child
            except OSError as error:
                shutil.rmtree(folder, ignore_errors=True)
                raise OutOfSpace(
                    f"The run cannot be recorded in {self.home.runs} ({error.strerror}); "
                    "free space."
                ) from error
            environment = {"WORKBENCH_HOME": str(self.home.root), "PYTHONUNBUFFERED": "1"}
            with log:
                subprocess.Popen(
                    [sys.executable, "-m", "workbench.runs.process", str(folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **environment},
                    start_new_session=True,
                )
        return read_run(folder)

    def list(self) -> list[RunView]:
        """All runs, newest first."""
        found = []
        for file in self.home.runs.glob("*/run.json"):
            # One that cannot be read must not hide the others.
            with suppress(NameNotFound):
                found.append(read_run(file.parent))
        return sorted(found, key=lambda view: -view.record.asked_at)

    def get(self, run_id: str) -> RunView:
        """The run called `run_id`.

        Raises:
            NameNotFound: no such run.
        """
        if not re.fullmatch(r"[a-z0-9-]{1,80}", run_id):
            raise NameNotFound(f"There is no run {run_id[:60]!r}; see 'workbench runs list'.")
        return read_run(self.home.runs / run_id)

    def cancel(self, run_id: str) -> RunView:
        """Ask a run to stop; it does so at its next safe point."""
        view = self.get(run_id)
        if not view.ended:
            (view.folder / "cancel").touch()
        return view

    def follow(self, run_id: str, watch: Watch = lambda _: None) -> RunView:
        """Return the run once it has ended well, showing every change to `watch`.

        Raises:
            Cancelled: it was cancelled.
            WorkbenchError: it failed; of the class, and with the words, of the run's own error.
        """
        while True:
            view = self.get(run_id)
            watch(view)
            if view.ended:
                break
            time.sleep(0.2)
        if view.state.state == "cancelled":
            raise Cancelled(f"The run {run_id} was cancelled.")
        if view.state.state == "failed":
            if view.state.error_kind:
                raise error_named(view.state.error_kind)(view.state.error)
            raise RunFailed(f"{view.state.error} Its log is {Path(view.folder, 'log.txt')}.")
        return view
