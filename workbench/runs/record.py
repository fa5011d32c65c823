"""A run on disk: one folder, written by the run's own process, read by everybody.

runs/<id>/run.json        kind, parameters, when it was asked for
runs/<id>/state.json      queued | waiting | running | done | failed | cancelled, share, words
runs/<id>/events.jsonl    measurements as they come (loss, margin per dose, ...)
runs/<id>/result.json     what came out
runs/<id>/log.txt         everything printed
runs/<id>/cancel          there if someone asked it to stop
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from vectors.errors import NameNotFound
from workbench.engines.vllm.watchdog import is_alive

__all__ = ["ENDED", "RESUMABLE", "RunRecord", "RunState", "RunView", "read_run", "write_json"]

State = Literal["queued", "waiting", "running", "done", "failed", "cancelled"]
ENDED = ("done", "failed", "cancelled")
RESUMABLE = ("train", "learn")
"""Kinds that keep what they did in their folder, so that `Runs.resume` goes on from there."""
START_LIMIT = 30.0


class RunRecord(BaseModel):
    """What was asked for; never changes."""

    model_config = ConfigDict(frozen=True)
    id: str
    kind: str
    parameters: dict[str, Any]
    asked_at: float


class RunState(BaseModel):
    """How far it is; replaced as it goes. `asked_at` is when it was resumed, 0 if it never was."""

    model_config = ConfigDict(frozen=True)
    asked_at: float = 0.0
    state: State = "queued"
    process: str = ""
    share: float = 0.0
    words: str = ""
    started_at: float = 0.0
    ended_at: float = 0.0
    error: str = ""
    error_kind: str = ""


class RunView(BaseModel):
    """A run as a person sees it."""

    model_config = ConfigDict(frozen=True)
    record: RunRecord
    state: RunState
    folder: Path

    @property
    def id(self) -> str:
        """The run's name, by which it is followed and cancelled."""
        return self.record.id

    @property
    def kind(self) -> str:
        """One of `workbench.runs.parameters.KINDS`, such as extract or train."""
        return self.record.kind

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.state.state in ENDED

    @property
    def resumable(self) -> bool:
        """Whether it has stopped before its end and can go on from there."""
        return self.kind in RESUMABLE and self.state.state in ("failed", "cancelled")

    @property
    def seconds(self) -> float:
        """Seconds since the work began."""
        if not self.state.started_at:
            return 0.0
        return (self.state.ended_at or time.time()) - self.state.started_at

    @property
    def seconds_left(self) -> float | None:
        """A straight-line estimate, once there is something to estimate from."""
        if self.ended or self.state.share < 0.03 or self.seconds < 3:
            return None
        return self.seconds * (1 - self.state.share) / self.state.share

    def events(self, after: int = 0) -> list[dict[str, Any]]:
        """The measurements from number `after` on."""
        try:
            text = (self.folder / "events.jsonl").read_text(errors="replace")
        except OSError:
            return []
        # What follows the last line break is a line half-written at the moment of reading.
        return [_event(line) for line in text.split("\n")[after:-1]]

    def result(self) -> dict[str, Any]:
        """What came out; empty until the run is done."""
        try:
            return json.loads((self.folder / "result.json").read_text())
        except (OSError, ValueError):
            return {}

    def log_tail(self, lines: int = 20) -> str:
        """The last lines that the run printed."""
        try:
            return "\n".join(
                (self.folder / "log.txt").read_text(errors="replace").splitlines()[-lines:]
            )
        except OSError:
            return ""


def _event(line: str) -> dict[str, Any]:
    """A line that a full disk or a kill cut off is an event of no kind."""
    try:
        found = json.loads(line)
    except ValueError:
        return {"kind": ""}
    return found if isinstance(found, dict) else {"kind": ""}


def write_json(path: Path, value: Any) -> None:
    """Replace `path` at once by `value` as JSON."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, path)


def read_run(folder: Path) -> RunView:
    """Read the run in `folder`; one whose process was killed is reported as failed.

    Raises:
        NameNotFound: there is no run there.
    """
    try:
        record = RunRecord.model_validate_json((folder / "run.json").read_text())
    except (OSError, ValidationError) as error:
        raise NameNotFound(
            f"There is no run '{folder.name[:60]}'; see 'workbench runs list'."
        ) from error
    state = _read_state(folder)
    if _is_gone(record, state):
        # It may have written its end and left between the two looks.
        state = _read_state(folder)
    if _is_gone(record, state):
        state = state.model_copy(
            update={
                "state": "failed",
                "error": _killed(record),
                "error_kind": "RunFailed",
                "ended_at": state.ended_at or _last_word(folder, state),
            }
        )
    return RunView(record=record, state=state, folder=folder)


def _last_word(folder: Path, state: RunState) -> float:
    """When a run that was killed last wrote something, as its files say."""
    times = [state.started_at]
    for name in ("state.json", "events.jsonl", "log.txt"):
        with suppress(OSError):  # it may be deleted meanwhile
            times.append((folder / name).stat().st_mtime)
    return max(times)


def _killed(record: RunRecord) -> str:
    advice = "start it again"
    if record.kind in RESUMABLE:
        advice = f"it goes on where it was by 'workbench runs resume {record.id}'"
    return f"The run's process was killed before it ended; {advice}."


def _read_state(folder: Path) -> RunState:
    try:
        return RunState.model_validate_json((folder / "state.json").read_text())
    except (OSError, ValidationError):
        return RunState()


def _is_gone(record: RunRecord, state: RunState) -> bool:
    """Whether the run has not ended and nobody is there to end it."""
    if state.state in ENDED:
        return False
    if not state.process:
        return time.time() - max(record.asked_at, state.asked_at) > START_LIMIT
    return not is_alive(state.process)
