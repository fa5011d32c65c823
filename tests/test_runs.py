"""Contract: runs as processes on this machine; what they write, how they end, how they are told."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from vectors.errors import Cancelled, InputError, NameNotFound, NotSteerable, RunFailed
from workbench.runs import process, record
from workbench.runs.manager import Runs
from workbench.runs.process import Progress
from workbench.runs.record import RunRecord, RunState, RunView, read_run, write_json
from workbench.settings import Home

# A kind that no version will have: a run of it ends as soon as the work is looked up.
KIND = "nonsense"
PARAMETERS = {"model": "none", "engine": "vllm"}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "home"))
    return Runs(Home.default())


@pytest.fixture
def busy(runs: Runs) -> Iterator[None]:
    """Another heavy run is under way."""
    with FileLock(runs.home.runs / ".heavy.lock"):
        yield
        for view in runs.list():
            runs.cancel(view.id)
        until(lambda: all(view.ended for view in runs.list()))


def until(true: Callable[[], Any], seconds: float = 40.0) -> None:
    """Wait for something to come true."""
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.05)


def a_run(runs: Runs, **state: Any) -> Path:
    """The folder of a run that no process belongs to."""
    folder = runs.home.runs / f"{KIND}-1"
    folder.mkdir()
    asked = RunRecord(id=folder.name, kind=KIND, parameters=PARAMETERS, asked_at=time.time())
    write_json(folder / "run.json", asked.model_dump())
    if state:
        write_json(folder / "state.json", RunState(**state).model_dump())
    return folder


# -- real processes ---------------------------------------------------------------------------------


def test_an_unknown_kind_fails_with_its_own_error(runs: Runs) -> None:
    view = runs.start(KIND, PARAMETERS)
    seen: list[RunView] = []
    with pytest.raises(InputError, match=KIND):
        runs.follow(view.id, seen.append)
    assert seen[-1].state.state == "failed"
    assert seen[-1].state.error_kind == "InputError"
    assert seen[-1].result() == {}


def test_killed_is_failed_and_says_so(runs: Runs, busy: None) -> None:
    view = runs.start(KIND, PARAMETERS)
    until(lambda: runs.get(view.id).state.process)
    os.kill(int(runs.get(view.id).state.process.split(":")[0]), signal.SIGKILL)
    until(lambda: runs.get(view.id).ended)
    with pytest.raises(RunFailed, match="was killed"):
        runs.follow(view.id)


def test_waiting_is_seen_and_can_be_cancelled(runs: Runs, busy: None) -> None:
    view = runs.start(KIND, PARAMETERS)
    until(lambda: runs.get(view.id).state.state == "waiting")
    assert "another run" in runs.get(view.id).state.words
    runs.cancel(view.id)
    with pytest.raises(Cancelled):
        runs.follow(view.id)
    assert runs.cancel(view.id).state.state == "cancelled"
    assert not (view.folder / "result.json").exists()


def test_asked_twice_it_is_one_run(runs: Runs, busy: None) -> None:
    first = runs.start(KIND, PARAMETERS)
    assert runs.start(KIND, dict(reversed(PARAMETERS.items()))).id == first.id
    other = runs.start(KIND, {**PARAMETERS, "seed": 1})
    assert other.id != first.id
    assert [view.id for view in runs.list()] == [other.id, first.id]
    runs.cancel(first.id)
    until(lambda: runs.get(first.id).ended)
    assert runs.start(KIND, PARAMETERS).id != first.id


def test_a_killed_training_is_resumed_as_the_same_run(runs: Runs, busy: None) -> None:
    view = runs.start("train", PARAMETERS)
    until(lambda: runs.get(view.id).state.process)
    os.kill(int(runs.get(view.id).state.process.split(":")[0]), signal.SIGKILL)
    until(lambda: runs.get(view.id).ended)
    assert f"runs resume {view.id}" in runs.get(view.id).state.error
    (view.folder / "cancel").touch()
    first = runs.get(view.id).state.process
    assert runs.get(view.id).resumable
    assert runs.resume(view.id).id == view.id
    assert not runs.get(view.id).ended
    until(lambda: runs.get(view.id).state.process not in ("", first))
    assert runs.resume(view.id).id == view.id, "it is under way, so that is the run"
    assert len(runs.list()) == 1
    with pytest.raises(InputError, match="cancel it first"):
        runs.delete(view.id)


def test_what_cannot_be_resumed(runs: Runs) -> None:
    with pytest.raises(NameNotFound):
        runs.resume("train-nothing")
    folder = a_run(runs, state="failed")
    with pytest.raises(InputError, match="start it again"):
        runs.resume(folder.name)
    done = RunRecord(id=folder.name, kind="train", parameters=PARAMETERS, asked_at=1.0)
    write_json(folder / "run.json", done.model_dump())
    write_json(folder / "state.json", RunState(state="done").model_dump())
    with pytest.raises(InputError, match="is done"):
        runs.resume(folder.name)
    runs.delete(folder.name)
    assert not folder.exists()


# -- records ----------------------------------------------------------------------------------------


def test_a_half_written_event_is_left_for_the_next_look(runs: Runs) -> None:
    folder = a_run(runs)
    whole = [{"kind": "step", "n": n, "more": {"x": 1}} for n in range(3)]
    text = "".join(json.dumps(row) + "\n" for row in whole)
    cut = text.rindex("}")  # the inner object is closed, the line is not
    for end in (cut, cut + 1):
        (folder / "events.jsonl").write_text(text[:end])
        assert read_run(folder).events() == whole[:2]
    (folder / "events.jsonl").write_text(text)
    assert read_run(folder).events() == whole
    assert read_run(folder).events(after=2) == whole[2:]
    assert read_run(folder).events(after=9) == []
    # A line that a full disk cut off takes none with it, neither when it is read nor when a run goes on.
    (folder / "events.jsonl").write_text(text + '{"kind": "cut o')
    Progress(folder).event(kind="after")
    assert read_run(folder).events() == [*whole, {"kind": ""}, {"kind": "after"}]
    (folder / "events.jsonl").write_text(text + "[1]\n")
    assert read_run(folder).events() == [*whole, {"kind": ""}]


def test_a_run_that_ends_between_two_looks_has_not_failed(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_run(runs, state="running", process="1:1.00")

    def leaves(marked: str) -> bool:
        write_json(folder / "state.json", RunState(state="done", process=marked).model_dump())
        return False

    monkeypatch.setattr(record, "is_alive", leaves)
    assert read_run(folder).state.state == "done"


def test_a_killed_run_took_until_it_wrote_its_last(runs: Runs) -> None:
    began = time.time() - 1000
    folder = a_run(runs, state="running", process="1:1.00", started_at=began)
    os.utime(folder / "state.json", (began + 50, began + 50))
    assert read_run(folder).seconds == pytest.approx(50)
    (folder / "log.txt").write_text("more")
    os.utime(folder / "log.txt", (began + 80, began + 80))
    assert read_run(folder).seconds == pytest.approx(80)


def test_a_run_that_never_began(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = a_run(runs)
    assert read_run(folder).state.state == "queued"
    monkeypatch.setattr(record, "START_LIMIT", -1.0)
    assert read_run(folder).state.state == "failed"


def test_damaged_records_do_not_hide_the_others(runs: Runs) -> None:
    folder = a_run(runs, state="done", share=1.0)
    (runs.home.runs / "broken-1").mkdir()
    (runs.home.runs / "broken-1" / "run.json").write_text("{half")
    (folder / "log.txt").write_bytes(b"fine\n\xff\xfe\n")
    (folder / "result.json").write_text("{half")
    [view] = runs.list()
    assert view.log_tail().startswith("fine")
    assert view.result() == {}
    with pytest.raises(NameNotFound):
        runs.get("broken-1")


@pytest.mark.parametrize("name", ["", "..", "../runs", "a/b", "A", "x" * 100, "a\n", "nothing-1"])
def test_names_of_no_run(runs: Runs, name: str) -> None:
    with pytest.raises(NameNotFound):
        runs.get(name)
    with pytest.raises(NameNotFound):
        runs.cancel(name)


def test_the_time_left_is_told_once_it_can_be(runs: Runs) -> None:
    now = time.time()
    view = read_run(a_run(runs, state="done", share=0.5, started_at=now - 10, ended_at=now))
    assert view.seconds == pytest.approx(10, abs=0.1) and view.seconds_left is None
    running = view.model_copy(update={"state": RunState(share=0.25, started_at=now - 10)})
    assert running.seconds_left == pytest.approx(30, abs=1)
    early = view.model_copy(update={"state": RunState(share=0.01, started_at=now - 10)})
    assert early.seconds_left is None


# -- the process's own module -----------------------------------------------------------------------


def in_this_process(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, work: Callable[..., dict[str, Any]]
) -> tuple[int, RunView]:
    """Do a run here, with `work` in the place of the real one."""
    folder = a_run(runs)
    monkeypatch.setattr(sys, "argv", ["process", str(folder)])
    return process.main(work), read_run(folder)


def test_work_that_ends_well(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(kind: str, parameters: Any, home: Home, progress: Progress) -> dict[str, Any]:
        assert (kind, parameters, home) == (KIND, PARAMETERS, runs.home)
        progress(0.5, "half")
        progress.event(kind="step", n=1)
        return {"answer": 42}

    code, view = in_this_process(runs, monkeypatch, work)
    assert (code, view.state.state, view.state.share) == (0, "done", 1.0)
    assert view.result() == {"answer": 42}
    assert view.events() == [{"kind": "step", "n": 1}]


@pytest.mark.parametrize(
    ("error", "code", "state", "kind", "words"),
    [
        (NotSteerable("No direction."), 0, "failed", "NotSteerable", "No direction."),
        (Cancelled("Stop."), 0, "cancelled", "", ""),
        (MemoryError(), 0, "failed", "", "out of memory"),
        (RuntimeError("[enforce] can't allocate memory: 8 GB"), 0, "failed", "", "out of memory"),
        (ZeroDivisionError("oh"), 1, "failed", "", "A fault of ours"),
        (KeyboardInterrupt(), 1, "failed", "", "A fault of ours"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_work_that_ends_badly(
    runs: Runs,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    state: str,
    kind: str,
    words: str,
) -> None:
    def work(*_: Any) -> dict[str, Any]:
        raise error

    found, view = in_this_process(runs, monkeypatch, work)
    assert (found, view.state.state, view.state.error_kind) == (code, state, kind)
    assert words in view.state.error
    with FileLock(runs.home.runs / ".heavy.lock", timeout=0):
        pass
    if state == "failed":
        expected = NotSteerable if kind else RunFailed
        with pytest.raises(expected):
            runs.follow(view.id)


def test_what_fails_after_a_cancel_is_cancelled(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(kind: str, parameters: Any, home: Home, progress: Progress) -> dict[str, Any]:
        assert progress.folder is not None
        (progress.folder / "cancel").touch()
        raise ValueError("half a batch came back")

    _, view = in_this_process(runs, monkeypatch, work)
    assert view.state.state == "cancelled"
    assert not view.state.error


# -- progress ---------------------------------------------------------------------------------------


def test_parts_of_progress_nest(runs: Runs) -> None:
    folder = a_run(runs)
    progress = Progress(folder)

    def share() -> float:
        return read_run(folder).state.share

    progress(0.1, "begun")
    assert share() == pytest.approx(0.1)
    part = progress.part(0.2, 0.6)
    part(0.5, "half of the part")
    assert share() == pytest.approx(0.4)
    inner = part.part(0.5, 1.0)
    inner(0.5, "three quarters of it")
    assert share() == pytest.approx(0.5)
    inner(7.0, "past the end")
    assert share() == pytest.approx(0.6)
    progress(0.9, "again at the top")
    assert share() == pytest.approx(0.9)
    assert inner.folder == folder
    inner.event(n=1)
    inner.say(words="said by a part")
    progress.event(n=2)
    view = read_run(folder)
    assert (view.state.words, [row["n"] for row in view.events()]) == ("said by a part", [1, 2])


def test_progress_does_not_write_at_every_call(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []
    monkeypatch.setattr(process, "write_json", lambda path, value: written.append(value))
    progress = Progress(a_run(runs)).part(0, 1)
    for n in range(1000):
        progress(n / 1000, "the same words")
    assert 1 <= len(written) < 100


def test_every_part_learns_that_it_must_stop(runs: Runs) -> None:
    folder = a_run(runs)
    part = Progress(folder).part(0, 0.5).part(0, 0.5)
    part.check()
    (folder / "cancel").touch()
    assert part.cancelled()
    for safe_point in (part.check, lambda: part(0.5, "on")):
        with pytest.raises(Cancelled):
            safe_point()


def test_progress_without_a_folder_is_silent() -> None:
    progress = Progress()
    progress.part(0, 0.5)(0.5, "words")
    progress.event(n=1)
    progress.say(words="x")
    progress.check()
    assert not progress.cancelled() and progress.folder is None
