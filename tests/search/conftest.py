"""The tiny model with task vectors that really teach it something, without an engine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from workbench.data.templates import sample
from workbench.models.loading import load_model
from workbench.runs.parameters import checked
from workbench.runs.process import Progress
from workbench.runs.work import do
from workbench.service import Workbench
from workbench.train.batches import Decision, collate
from workbench.train.logits import whole_logits
from workbench.train.losses import token_loss

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def searched_home(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Workbench:
    """A home of its own with the model `tiny`, and in its library:

    glad      taught the cheerful sides, so that their margin rises
    noise     random numbers, which teach nothing and raise the general loss
    ramp      seven revisions; from the fifth on `glad` and noise, before it next to nothing
    dish      a recipe of glad and half the noise; noises, one of two that are alike
    foreign   a task vector of another base
    """
    root = tmp_path_factory.mktemp("search") / "home"
    workbench = Workbench(root, "tiny")
    shutil.copytree(tiny_folder, workbench.home.models / "tiny")
    info = workbench.model()
    base = load_file(info.folder / "model.safetensors")
    library = workbench.library

    def save(name: str, tuned: dict[str, torch.Tensor]) -> Any:
        return library.save_task(name, info.base, base, tuned)

    glad, noise = _taught(workbench, base), _noise(base, 0.02)
    save("glad", glad)
    save("noise", noise)
    for number in range(7):
        save("ramp", _noise(base, 0.08, 3) if number >= 4 else _noise(base, 1e-4, number))
    save("twice", glad)
    save("twice", noise)
    save("twice", glad)
    library.save_task("foreign", "cd" * 32, {"w": torch.zeros(4)}, {"w": torch.ones(4)})
    workbench.combine("dish", "glad=1,noise=0.5")
    workbench.combine("noises", "noise=2,ramp@7=1")
    return workbench


def _noise(base: dict[str, torch.Tensor], size: float, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        name: (w.float() + size * torch.randn(w.shape, generator=rng)).to(w.dtype)
        for name, w in base.items()
        if w.ndim == 2 and "embed" not in name
    }


def _taught(workbench: Workbench, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights after steps towards the cheerful sides, and away from the others.

    The held-out pairs themselves are learnt: what is needed is a margin that surely rises.
    """
    loaded = load_model(workbench.model())
    model: Any = loaded.model
    moved = {n: p for n, p in model.named_parameters() if n in base}
    for parameter in moved.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(moved.values(), lr=1e-2)
    pairs = workbench.contrast.get("cheerful").held_out
    for start in [*range(0, len(pairs), 8)] * 10:
        for side, sign in (("positive", 1), ("negative", -1)):
            some = pairs[start : start + 8]
            rows = [sample(loaded.tokenizer, p.prompt, getattr(p, side)) for p in some]
            batch = collate([Decision(r.context, r.completion) for r in rows], "cpu")
            (sign * token_loss(whole_logits(model, batch), batch.labels_N)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().to(base[name].dtype) for name, p in moved.items()}


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(searched_home: Workbench, tmp_path: Path) -> Run:
    """Do a run in this process: its parameters checked, its folder a temporary one."""

    def work(kind: str, **parameters: Any) -> dict[str, Any]:
        asked = {"model": "tiny", "engine": "transformers", **parameters}
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        known = checked(kind, asked, searched_home)
        return do(kind, known, searched_home.home, Progress(folder))

    return work
