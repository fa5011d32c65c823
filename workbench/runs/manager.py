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

from vectors.errors import (
    Cancelled,
    InputError,
    NameNotFound,
    OutOfSpace,
    RunFailed,
    error_named,
)
from workbench.runs.record import RESUMABLE, RunRecord, RunState, RunView, read_run, write_json
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
                self._launch(folder)
            except OSError as error:
                shutil.rmtree(folder, ignore_errors=True)
                raise OutOfSpace(
                    f"The run cannot be recorded in {self.home.runs} ({error.strerror}); "
                    "free space."
                ) from error
        return read_run(folder)

    def _launch(self, folder: Path) -> None:
        environment = {"WORKBENCH_HOME": str(self.home.root), "PYTHONUNBUFFERED": "1"}
        with open(folder / "log.txt", "a") as log:
            subprocess.Popen(
                [sys.executable, "-m", "workbench.runs.process", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    def resume(self, run_id: str) -> RunView:
        """Let a training that failed, was cancelled or was killed go on from its last checkpoint.

        Decisions that were written and steps that were saved are not done again, and the weights
        at the end are those of a run that was never stopped. The same work that is under way in
        another run is returned instead.

        Raises:
            NameNotFound: no such run.
            InputError: a run that is done, or of a kind that keeps nothing to go on from.
            OutOfSpace: its folder cannot be written.
        """
        with FileLock(self.home.runs / ".start.lock"):
            view = self.get(run_id)
            if view.kind not in RESUMABLE:
                raise InputError(
                    f"A run of kind '{view.kind}' starts anew each time; start it again."
                )
            if view.state.state == "done":
                raise InputError(f"The run {run_id} is done; see 'workbench runs show {run_id}'.")
            for other in self.list():
                same = other.kind == view.kind and other.record.parameters == view.record.parameters
                if same and not other.ended:
                    return other
            try:
                (view.folder / "cancel").unlink(missing_ok=True)
                # Without a process in it, the state says that one is being started.
                write_json(view.folder / "state.json", RunState(asked_at=time.time()).model_dump())
                self._launch(view.folder)
            except OSError as error:
                raise OutOfSpace(
                    f"The run {run_id} cannot be written ({error.strerror}); free space."
                ) from error
        return read_run(view.folder)

    def delete(self, run_id: str) -> None:
        """Delete the folder of a run that has ended; what it put into the library stays.

        Raises:
            NameNotFound: no such run.
            InputError: it is still under way.
        """
        with FileLock(self.home.runs / ".start.lock"):
            view = self.get(run_id)
            if not view.ended:
                raise InputError(f"The run {run_id} is under way; cancel it first.")
            shutil.rmtree(view.folder, ignore_errors=True)

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
