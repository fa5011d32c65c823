"""Contract: the home is made, or refused in one sentence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vectors.errors import OutOfSpace
from workbench.settings import Home, package_version


def test_a_home_is_made_with_its_rooms(tmp_path: Path) -> None:
    home = Home.at(tmp_path / "deep" / "home")
    for folder in (home.models, home.library, home.runs, home.engines):
        assert folder.is_dir() and folder.parent == home.root
    assert [f.name for f in home.root.iterdir() if f.is_file()] == []


def test_the_environment_names_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "named"))
    assert Home.default().root == (tmp_path / "named").resolve()
    monkeypatch.delenv("WORKBENCH_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert Home.default().root == (tmp_path / "data" / "steering-workbench").resolve()


def test_a_relative_home_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    home = Home.at("here")
    monkeypatch.chdir("/")
    assert home.runs.is_dir()


def test_a_home_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutOfSpace, match="WORKBENCH_HOME"):
        Home.at(tmp_path / "file" / "home")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_home_without_permission_is_refused(tmp_path: Path) -> None:
    Home.at(tmp_path)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutOfSpace, match="cannot be written"):
            Home.at(tmp_path)
    finally:
        tmp_path.chmod(0o700)


def test_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(OutOfSpace, match="No space left"):
        Home.at(tmp_path)


def test_versions() -> None:
    assert package_version("pytest")
    assert package_version("no-such-distribution-anywhere") == ""
