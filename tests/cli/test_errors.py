"""Surface: exit codes, one sentence for each error, and the same as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vectors.errors import InputError
from workbench.commands.serve import _check_running
from workbench.service import Workbench

BAD = [
    (["frobnicate"], "UsageError"),
    (["library"], "UsageError"),
    (["extract", "--name", "x"], "UsageError"),
    (["generate"], "UsageError"),
    (["verify", "x", "--controls", "many"], "UsageError"),
    (["models", "list", "--frob"], "UsageError"),
    (["models", "list", "--engine", "frob"], "InputError"),
    (["models", "add", "BAD NAME", "."], "GrammarError"),
    (["models", "add", "empty", "/"], "ModelNotSupported"),
    (["models", "show", "nowhere"], "NameNotFound"),
    (["models", "show", "~nobody-here/y"], "InputError"),
    (["models", "show", "a" * 300], "NameNotFound"),
    (["models", "add", "x", "~nobody-here/y"], "InputError"),
    (["contrast", "show", "nothing"], "NameNotFound"),
    (["contrast", "check", "/nowhere.jsonl"], "ContrastSetError"),
    (["contrast", "delete", "cheerful"], "NameNotFound"),
    (["extract", "--contrast", "cheerful", "--name", "BAD"], "GrammarError"),
    (["extract", "--contrast", "nothing", "--name", "x"], "NameNotFound"),
    (["extract", "--contrast", "cheerful", "--name", "x", "--method", "magic"], "InputError"),
    (["verify", "nothing"], "NameNotFound"),
    (["verify", "nothing", "--doses", "0.1,x"], "InputError"),
    (["verify", "nothing", "--doses", "99"], "DoseError"),
    (["train", "--name", "x"], "InputError"),
    (["train", "--name", "x", "--data", "f.jsonl"], "InputError"),
    (["train", "--name", "x", "--strip-instructions", "f.jsonl"], "InputError"),
    (["train", "--name", "x", "--data", "f.jsonl", "--vector", "v"], "InputError"),
    (["train", "--name", "x", "--contrast", "brief"], "InputError"),
    (["train", "--name", "x", "--contrast", "brief", "--prefer", "both"], "InputError"),
    (["train", "--name", "x", "--data", "f.jsonl", "--prefer", "positive"], "InputError"),
    (["train", "--name", "x"], "InputError"),
    (["train", "--name", "x", "--vector", "nothing"], "NameNotFound"),
    (["compare", "--vector", "nothing", "--task", "x"], "NameNotFound"),
    (["search", "nothing", "--behaviour", "cheerful"], "NameNotFound"),
    (["search", "a", "--behaviour", "cheerful", "--coefficients", "0.5,x"], "InputError"),
    (["search", "a", "--behaviour", "cheerful", "--range", "a"], "InputError"),
    (["search", "a"], "UsageError"),
    (["runs", "keep", "search-1", "best"], "NameNotFound"),
    (["bisect", "nothing"], "NameNotFound"),
    (["bisect", "a..a"], "InputError"),
    (["library", "show", "nothing"], "NameNotFound"),
    (["library", "import", "/nowhere.safetensors"], "UsageError"),
    (["library", "import", "/nowhere.safetensors", "--name", "x"], "VectorFileError"),
    (["library", "import", "/nowhere.safetensors", "--name", "../x"], "GrammarError"),
    (["library", "import", "/dev/zero", "--name", "x"], "VectorFileError"),
    (["library", "import", "/", "--name", "x", "--format", "magic"], "InputError"),
    (["library", "export", "nothing", "x.gguf"], "NameNotFound"),
    (["library", "export", "nothing", "~nobody-here/x.gguf"], "InputError"),
    (["library", "import", "~nobody-here/x", "--name", "x"], "InputError"),
    (["library", "materialise", "a=1", "--out", "~nobody-here/z"], "InputError"),
    (["library", "push", "~nobody-here/z"], "InputError"),
    (["library", "log", "--limit", "9" * 30], "InputError"),
    (["train", "--name", "x", "--data", "~nobody-here/x.jsonl"], "InputError"),
    (["runs", "show", "nothing"], "NameNotFound"),
    (["runs", "cancel", "../../etc"], "NameNotFound"),
    (["serve", "--engine", "transformers"], "InputError"),
    (["serve", "--lora-slots", "-1"], "UsageError"),
    (["generate", "Hi", "--as", "lora"], "InputError"),
    (["generate", "Hi", "--as", "prompt"], "UsageError"),
]


@pytest.mark.parametrize(("arguments", "kind"), BAD, ids=[" ".join(row[0])[:80] for row in BAD])
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: list[str], kind: str, workbench: Any
) -> None:
    told = workbench(*arguments)
    assert told.code == 2
    assert told.out == ""
    assert told.err.count("\n") == 1 and told.err.endswith(".\n"), told.err
    assert "Traceback" not in told.err
    as_json = workbench("--json", *arguments)
    assert as_json.code == 2
    assert as_json.err == ""
    assert as_json.json["error"]["kind"] == kind
    assert as_json.json["error"]["message"] == told.err.rstrip("\n")


def test_options_may_stand_before_or_after_the_command(workbench: Any, tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    before = workbench("--json", "--home", other, "models", "list")
    after = workbench("models", "list", "--json", "--home", other)
    assert before.json == after.json
    assert (tmp_path / "other" / "runs").is_dir()
    assert workbench("--home", other, "models", "list", "--home", str(tmp_path / "third")).code == 0
    assert (tmp_path / "third" / "runs").is_dir()


def test_a_home_that_cannot_be_written_is_exit_code_3(workbench: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told = workbench("models", "list", "--home", str(tmp_path / "file" / "home"))
    assert told.code == 3
    assert told.err.count("\n") == 1 and "WORKBENCH_HOME" in told.err


def broken(*_: Any) -> Any:
    raise KeyError("lost key")


def test_a_fault_is_one_sentence_and_exit_code_1(
    workbench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workbench, "models", broken)
    told = workbench("models", "list")
    assert told.code == 1
    assert "KeyError" in told.err and "lost key" in told.err and told.err.count("\n") == 1
    assert workbench("models", "list", "--json").json["error"]["kind"] == "Fault"
    monkeypatch.setenv("WORKBENCH_DEBUG", "1")
    assert "Traceback" in workbench("models", "list").err


def test_interrupts_are_quiet(workbench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Workbench, "models", interrupted)
    told = workbench("models", "list")
    assert (told.code, told.out, told.err) == (130, "", "")


def test_a_reader_that_leaves_is_no_error(home: Path) -> None:
    command = f"'{sys.executable}' -m workbench.cli contrast show cheerful | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1


def test_markup_and_control_of_a_name_are_not_taken_for_style(workbench: Any) -> None:
    told = workbench("contrast", "show", "[bold]nothing[/bold] :smile:")
    assert "[bold]nothing[/bold] :smile:" in told.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["models", "list"],
        ["contrast", "list"],
        ["contrast", "show", "brief"],
        ["library", "list"],
        ["library", "log"],
        ["runs", "list"],
        ["doctor"],
    ],
    ids=" ".join,
)
def test_results_as_json_are_one_object(arguments: list[str], workbench: Any) -> None:
    found = workbench(*arguments, "--json")
    assert isinstance(found.json, dict)
    assert found.err == ""
    plain = workbench(*arguments)
    assert plain.code == found.code
    assert plain.out.strip()


def test_json_after_two_dashes_is_text(workbench: Any) -> None:
    told = workbench("generate", "--temperature", "x", "--", "--json")
    assert told.code == 2
    assert told.out == ""
    with pytest.raises(ValueError):
        json.loads(told.err)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((None, 4, None, None, None, None), "without --lora-slots 4; stop it"),
        ((4096, 2, 64, 600, "add", False), "without --rows 600; stop it"),
        ((8000, None, 128, None, None, None), "without --window 8000 and --lora-rank 128; stop it"),
        ((None, None, None, None, "all", True), "without --operators all and --capture; stop it"),
        ((4096, 2, 64, 512, "add", False), ""),
        ((None,) * 6, ""),
    ],
)
def test_an_engine_that_runs_keeps_its_settings(given: Any, words: str) -> None:
    runs = {"lora": {"slots": 2, "rank": 64}, "rows": 512, "projecting": 0, "capture": False}
    runs["window"] = 4096
    if not words:
        _check_running(runs, *given)
        return
    with pytest.raises(InputError, match=words):
        _check_running(runs, *given)
