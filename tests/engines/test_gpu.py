"""How much of a GPU the engine takes, and what a machine without one says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vectors.errors import InputError
from workbench.engines.vllm import gpu, server
from workbench.engines.vllm.gpu import SHARE, gpu_bytes, gpu_share, has_cuda, share_for
from workbench.engines.vllm.settings import LoraSlots

GIB = 1 << 30


@pytest.mark.parametrize(
    ("weights", "total", "share"),
    [(GIB // 4, 80 * GIB, 0.5), (16 * GIB, 80 * GIB, 0.5), (16 * GIB, 24 * GIB, 0.9)],
)
def test_half_is_left_for_training_unless_the_model_needs_more(weights, total, share):
    assert share_for(weights, total) == share


def test_a_model_that_needs_more_than_half_gets_just_that():
    share = share_for(8 * GIB, 24 * GIB)
    assert share == pytest.approx((1.25 * 8 + 4) / 24, abs=1e-3)


def test_an_unknown_gpu_is_halved():
    assert share_for(16 * GIB, 0) == 0.5


def test_a_person_names_the_share(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(SHARE, "0.3")
    assert gpu_share(GIB) == 0.3


@pytest.mark.parametrize("wrong", ["all", "0", "1.2", "nan"])
def test_what_is_no_share_is_refused_by_its_name(wrong, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(SHARE, wrong)
    with pytest.raises(InputError, match=f"{SHARE}.*{wrong}"):
        gpu_share(GIB)


def test_the_drivers_tool_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 81559\necho 81559\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert gpu_bytes() == 81559 << 20
    tool.write_text("#!/bin/sh\necho 'No devices were found'\n")
    assert gpu_bytes() == 0
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert gpu_bytes() == 0


def test_either_sign_of_a_driver_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    there, missing = tmp_path / "nvidiactl", tmp_path / "version"
    there.touch()
    monkeypatch.setattr(gpu, "SIGNS", (str(missing), str(there)))
    assert has_cuda()
    monkeypatch.setattr(gpu, "SIGNS", (str(missing),))
    assert not has_cuda()


@pytest.mark.parametrize("there", [True, False])
def test_the_engine_is_told_its_share_where_there_is_a_gpu(there, tiny, monkeypatch):
    monkeypatch.setenv(SHARE, "0.3")
    monkeypatch.setattr(server, "has_cuda", lambda: there)
    command = server._command(tiny, 1, LoraSlots())
    assert ("--enforce-eager" in command) is not there
    assert ("--gpu-memory-utilization" in command) is there
    if there:
        assert command[command.index("--gpu-memory-utilization") + 1] == "0.3"
