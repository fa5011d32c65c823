"""Contract: commands that are runs; Ctrl-C, results, other people's runs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from workbench.commands import bench, page
from workbench.runs.manager import Runs
from workbench.runs.record import RunState, write_json
from workbench.settings import Home


@pytest.fixture
def busy(home: Path) -> Any:
    """A home where another heavy run is under way, so that every new one waits."""
    with FileLock(Home.at(home).runs / ".heavy.lock"):
        yield
        runs = Runs(Home.at(home))
        for view in runs.list():
            runs.cancel(view.id)
        limit = time.monotonic() + 30
        while any(not view.ended for view in runs.list()) and time.monotonic() < limit:
            time.sleep(0.1)


EXTRACT = ("extract", "--contrast", "cheerful", "--name", "mine")


def test_ctrl_c_cancels_the_run_and_says_so(
    busy: None, home: Path, workbench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Runs, "follow", interrupted)
    told = workbench(*EXTRACT)
    assert told.code == 130
    [view] = Runs(Home.at(home)).list()
    assert view.state.state == "cancelled"
    assert told.err == f"The run {view.id} was cancelled.\n"
    assert workbench(*EXTRACT, "--json").json["error"]["kind"] == "Cancelled"
    shown = workbench("runs", "follow", view.id)
    assert shown.code == 130
    assert "goes on" in shown.err


def test_detach_returns_and_the_run_can_be_found(busy: None, workbench: Any) -> None:
    run = workbench(*EXTRACT, "--detach", "--json").json["run"]
    assert workbench(*EXTRACT, "--detach", "--json").json["run"] == run
    rows = workbench("runs", "list", "--json").json["runs"]
    assert [row["run"] for row in rows] == [run]
    shown = workbench("runs", "show", run, "--json").json
    assert shown["parameters"]["name"] == "mine"
    assert workbench("runs", "show", run).code == 0
    assert workbench("runs", "cancel", run).out == f"{run} is being cancelled.\n"
    told = workbench("runs", "follow", run)
    assert told.code == 1
    assert told.err == f"The run {run} was cancelled.\n"


RESULTS: dict[str, dict[str, Any]] = {
    "extract": {
        "name": "v",
        "revision": 1,
        "best_block": 1,
        "suggested_dose": 0.2,
        "words": "A clear direction.",
        "blocks": [
            {"block": b, "auroc": 0.9, "cohens_d": 1.0, "pair_accuracy": 1.0, "agreement": 0.2}
            for b in range(12)
        ],
    },
    "verify": {
        "base_margin": 1.0,
        "pairs": 25,
        "doses": [{"dose": 0.2, "margin": 2.0, "change": 1.0, "kl": 0.1}],
        "reasons": [{"rule": "effect", "passed": False, "words": "It does not exclude 0."}],
        "prompt": {"instruction": "Be kind.", "margin": 3.0, "change": 2.0},
        "break_dose": 0.4,
        "passed": False,
        "working_dose": 0.2,
        "seconds": 90.0,
    },
    "train": {
        "name": "t",
        "revision": 2,
        "vector": "v",
        "dose": 0.2,
        "recovered": 0.9,
        "margin": {"base": 1.0, "steered": 2.0, "trained": 1.9},
        "kl": {"steered": 0.1, "trained": 0.2},
        "changed_share": 0.4,
        "seconds": 4000.0,
        "tier": {"tier": 2, "why": "contexts are long"},
        "steps": {"steps": 3, "kept_step": 2},
    },
    "learn": {
        "name": "t",
        "revision": 1,
        "source": "chat.jsonl",
        "decisions": 12,
        "log_prob": {"base": -9.0, "trained": -4.0},
        "margin": {"base": 1.0, "trained": float("nan")},
        "recovered": None,
        "kl": {"trained": 0.1},
        "changed_share": 0.4,
        "seconds": 40.0,
        "tier": {"tier": 1, "why": "contexts are short"},
        "steps": {"steps": 3, "kept_step": 3},
    },
    "compare": {
        "vector": "v",
        "task": "t",
        "dose": 0.2,
        "rows": [{"prompt": "Hi [b]", "base": "1", "steered": "2", "trained": "3"}],
        "recovered": None,
        "margin": {"base": 1.0, "steered": 2.0, "trained": 1.9},
        "kl": {"steered": 0.1, "trained": float("nan")},
    },
    "search": {
        "way": "together",
        "behaviours": [{"name": "cheerful", "weight": 1.0, "pairs": 25, "base_margin": -7.0}],
        "points": [
            {
                "terms": "",
                "changes": {"cheerful": 0.0},
                "forgetting": 0.0,
                "score": 0.0,
                "within": True,
            },
            {
                "terms": "t=2",
                "changes": {"cheerful": float("nan")},
                "forgetting": 9.0,
                "score": float("nan"),
                "within": False,
            },
        ],
        "best": {"terms": ""},
        "words": "No coefficients are better.",
        "kept": {"name": "best", "revision": 1, "digest": "ab"},
        "seconds": 40.0,
    },
    "bisect": {
        "measured": [{"state": "t@1", "value": 1.0}, {"state": "t@2", "value": float("nan")}],
        "test": {"behaviour": "", "threshold": 0.5, "words": "the general loss"},
        "bad_is": "above",
        "words": "'t@2' changed it.",
        "seconds": 4.0,
    },
    "demo": {
        "vector": "demo-cheerful",
        "task": "demo-cheerful-baked",
        "passed": True,
        "dose": 0.2,
        "margin": {"base": 1.0, "negated": -1.0},
        "kl_neutral": {"trained_adamw": None},
        "recovered": 0.9,
        "recovered_adamw": None,
        "recovered_random": 0.0,
        "p_value": 0.05,
        "seconds": {"extract": 3.0},
    },
    "later": {"words": "a kind that this version does not know"},
}


@pytest.mark.parametrize("kind", RESULTS)
def test_results_are_drawn_and_are_strict_json(kind: str, home: Path, workbench: Any) -> None:
    folder = Home.at(home).runs / f"{kind}-1"
    folder.mkdir()
    record = {"id": f"{kind}-1", "kind": kind, "parameters": {}, "asked_at": time.time()}
    write_json(folder / "run.json", record)
    write_json(folder / "state.json", RunState(state="done", share=1.0).model_dump())
    write_json(folder / "result.json", RESULTS[kind])
    followed = workbench("runs", "follow", f"{kind}-1")
    assert followed.code == 0 and followed.out.strip()
    assert followed.out.rstrip() in workbench("runs", "show", f"{kind}-1").out
    assert "NaN" not in workbench("runs", "follow", f"{kind}-1", "--json").out


def test_bench_lists_and_runs_cases(
    tmp_path: Path, workbench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    assert workbench("bench").code == 3
    (tmp_path / "nothing.py").write_text('"""Measures nothing.\n\nMore."""\nraise SystemExit(4)\n')
    (tmp_path / "_helper.py").write_text("")
    listed = workbench("bench", "--json").json["cases"]
    assert listed == [{"case": "nothing", "about": "Measures nothing."}]
    assert workbench("bench", "nothing", "--quick").code == 4
    assert workbench("bench", "other").code == 2


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_second_page_of_one_home_and_a_port_in_use_are_refused(
    home: Path, workbench: Any
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        with FileLock(Home.at(home).engines / f"page-{port}.lock"):
            told = workbench("app", "--port", str(port), "--no-browser")
        assert told.code == 3
        assert "open already at" in told.err and told.err.count("\n") == 1
        other.listen()
        told = workbench("app", "--port", str(port), "--no-browser")
    assert told.code == 3
    assert "another program" in told.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_page_ends_with_the_command(number: signal.Signals, tmp_path: Path) -> None:
    child = tmp_path / "pid"
    sleeper = f"import os, time; open({str(child)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = (
        "import sys; from workbench.commands.page import _run; "
        f"sys.exit(_run([sys.executable, '-c', {sleeper!r}], ''))"
    )
    command = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.DEVNULL, start_new_session=True
    )
    limit = time.monotonic() + 20
    while not (child.exists() and child.read_text()) and time.monotonic() < limit:
        time.sleep(0.05)
    command.send_signal(number)
    command.wait(timeout=20)
    pid = int(child.read_text())
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < limit + 10:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{pid}")


def test_the_page_is_started_as_agreed(
    home: Path, workbench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(page, "_run", lambda line, url: seen.append([*line, url]) or 0)
    port = str(free_port())
    assert workbench("app", "--port", port, "--model", "m", "--engine", "transformers").code == 0
    expected = ["-m", "ui", "--model", "m", "--port", port, "--home", str(home.resolve())]
    assert seen[0][1:] == [*expected, "--engine", "transformers", f"http://127.0.0.1:{port}"]
