"""Where weights are merged is chosen in one place, told, and no part of the result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vectors.errors import BackendUnavailable, InputError
from vectors.store import Checkpoint, Library, base_digest
from vectors.tasks import Operation, Recipe, materialise
from workbench.merging.choose import SETTING, Merging, refusal
from workbench.merging.made import made_on, note

CUDA = torch.cuda.is_available()


def folder_of(folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    folder.mkdir()
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"weight": weight, "steps": torch.arange(3)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("setting", ["auto", "cpu"])
@pytest.mark.parametrize("method", ["ties", "linear", "dare"])
def test_the_choice_changes_no_bit_and_is_told(tmp_path: Path, setting: str, method: str) -> None:
    base = folder_of(tmp_path / "base")
    library, digest = Library(tmp_path / "library"), base_digest(base)
    tuned = {"weight": (Checkpoint(base)["weight"].float() * 1.01).bfloat16()}
    entry = library.save_task("task", digest, Checkpoint(base), tuned)
    recipe = Recipe(op=Operation.of(method, {}), base=digest, terms=((entry.digest, 0.7),))
    merging = Merging(setting)
    plain = materialise(library, recipe, base, tmp_path / "plain")
    chosen = materialise(library, recipe, base, tmp_path / "chosen", write=merging.write_weights)
    assert base_digest(plain) == base_digest(chosen)
    assert sorted(p.name for p in plain.iterdir()) == sorted(p.name for p in chosen.iterdir())
    made = merging.made
    assert made is not None
    on_card = CUDA and setting == "auto" and method != "dare"
    assert made.device == (torch.cuda.get_device_name() if on_card else "cpu")
    if not on_card:
        words = {"cpu": "asked for"}.get(setting, "there is none")
        assert made.why == (
            words if method != "dare" or setting == "cpu" else "the method 'dare' has no kernels"
        )
    assert made_on(chosen) == ""
    note(chosen, made)
    assert made_on(chosen) == made.device
    # Weights that were there already were not merged, and nothing is said of them.
    again = Merging(setting)
    materialise(library, recipe, base, tmp_path / "chosen", write=again.write_weights)
    assert again.made is None


def test_what_has_no_kernel_is_named(tmp_path: Path) -> None:
    half = Checkpoint(folder_of(tmp_path / "half", dtype=torch.float16))
    ties = Operation.of("ties", {})
    assert refusal(half, 3, ties) == "weights of F16 are not BF16"
    assert refusal(half, 3, Operation.of("tsv-m", {})) == "the method 'tsv-m' has no kernels"
    assert refusal(half, 0, ties) == "nothing is merged"


def test_the_environment_sets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTING, "gpu")
    with pytest.raises(InputError, match="auto, cpu, cuda, not on 'gpu'"):
        Merging()
    monkeypatch.setenv(SETTING, "cuda")
    half = Checkpoint(folder_of(tmp_path / "half", dtype=torch.float16))
    with pytest.raises(BackendUnavailable, match="nothing is merged"):
        list(Merging().write_weights(half, [], [], Operation.of("dare", {}), tmp_path))
