"""The process of one run: waits its turn, does the work, writes down what happens.

`python -m workbench.runs.process FOLDER`
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vectors.errors import Cancelled, WorkbenchError
from workbench.engines.vllm.watchdog import mark
from workbench.runs.record import RunState, read_run, write_json
from workbench.settings import Home

__all__ = ["Progress", "main"]


Work = Callable[[str, dict[str, Any], Home, "Progress"], dict[str, Any]]


class _Journal:
    """What a run writes down; all parts of its progress share one."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.state = RunState()
        self.written = 0.0

    def say(self, changes: dict[str, Any]) -> None:
        self.state = self.state.model_copy(update=changes)
        self.written = time.monotonic()
        if self.folder is not None:
            write_json(self.folder / "state.json", self.state.model_dump())


class Progress:
    """How a piece of work says how far it is, notes measurements, and learns that it must stop.

    Args:
        folder: of the run; without one nothing is written and nobody can cancel.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._journal = _Journal(folder)
        self._low, self._high = 0.0, 1.0

    def part(self, low: float, high: float) -> Progress:
        """This progress for one part of the work: its 0 to 1 is the share from `low` to `high`."""
        part = Progress()
        part._journal = self._journal
        part._low, part._high = self._at(low), self._at(high)
        return part

    def _at(self, share: float) -> float:
        return self._low + max(0.0, min(share, 1.0)) * (self._high - self._low)

    @property
    def folder(self) -> Path | None:
        """The run's folder, where work may keep what it needs to go on."""
        return self._journal.folder

    def __call__(self, share: float, words: str) -> None:
        """Say how far the work is, from 0 to 1, and what is going on; also a safe point to stop.

        Raises:
            Cancelled: somebody asked the run to stop.
        """
        self.check()
        journal = self._journal
        if time.monotonic() - journal.written > 0.15 or words != journal.state.words:
            self.say(share=self._at(share), words=words)

    def check(self) -> None:
        """Raise Cancelled if somebody asked the run to stop."""
        if self.cancelled():
            raise Cancelled("The run was cancelled.")

    def cancelled(self) -> bool:
        """Whether somebody asked the run to stop."""
        return self.folder is not None and (self.folder / "cancel").exists()

    def event(self, **values: Any) -> None:
        """Note a measurement."""
        if self.folder is None:
            return
        with open(self.folder / "events.jsonl", "ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            # What was cut off before must not take this line with it.
            cut = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
            file.write(b"\n" * cut + json.dumps(values).encode() + b"\n")

    def say(self, **changes: Any) -> None:
        """Replace the recorded state; a share is one of the whole run."""
        self._journal.say(changes)


def main(work: Work | None = None) -> int:
    """Do the run recorded in the folder named on the command line."""
    folder = Path(sys.argv[1])
    view = read_run(folder)
    progress = Progress(folder)
    progress.say(state="waiting", process=mark(), words="waiting for another run to end")
    try:
        home = Home.default()
        with _turn(home, progress):
            progress.say(state="running", started_at=time.time(), words="starting")
            if work is None:
                from workbench.runs.work import do as work  # noqa: PLC0415  # imports torch
            result = work(view.kind, view.record.parameters, home, progress)
            write_json(folder / "result.json", result)
        progress.say(state="done", share=1.0, words="done", ended_at=time.time())
    except BaseException as error:
        return _end(progress, error)
    return 0


def _end(progress: Progress, error: BaseException) -> int:
    """Write down how the run ended, and return the exit code of its process."""
    if not isinstance(error, WorkbenchError):
        traceback.print_exc()
    # What fails after it was told to stop fails because it was told to stop.
    if isinstance(error, Cancelled) or progress.cancelled():
        progress.say(state="cancelled", words="cancelled", ended_at=time.time())
    elif isinstance(error, WorkbenchError):
        _fail(progress, str(error), type(error).__name__)
    elif _out_of_memory(error):
        _fail(progress, "The machine ran out of memory; close programs or use a smaller batch.")
    else:
        _fail(progress, f"A fault of ours ended the run: {type(error).__name__}: {error}.")
        return 1
    return 0


@contextmanager
def _turn(home: Home, progress: Progress) -> Iterator[None]:
    """Hold the one place for heavy work, waiting for it until somebody cancels."""
    lock = FileLock(home.runs / ".heavy.lock")
    while True:
        with suppress(Timeout):
            lock.acquire(timeout=0.2)
            break
        progress.check()
    try:
        yield
    finally:
        lock.release()


def _out_of_memory(error: BaseException) -> bool:
    # torch raises a RuntimeError of its own, and must not be imported to be asked.
    words = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in words or "allocate memory" in words)
    )


def _fail(progress: Progress, words: str, kind: str = "") -> None:
    progress.say(state="failed", error=words, error_kind=kind, ended_at=time.time())


if __name__ == "__main__":
    sys.exit(main())
