"""From task vectors to a checkpoint folder, on tiny checkpoints."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vectors.errors import (
    Cancelled,
    ModelMismatch,
    NameNotFound,
    NameTaken,
    OutOfSpace,
    ShapeMismatch,
)
from vectors.store import Checkpoint, Entry, Library, base_digest
from vectors.tasks import METHODS, Operation, Recipe, combine, delta, materialise, merge, weights
from vectors.tasks.arithmetic import without

SHARDS = {"a": "model-1.safetensors", "b": "model-2.safetensors", "frozen": "model-2.safetensors"}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(8, 4, generator=rng).bfloat16(),
        "b": torch.randn(5, generator=rng),
        "frozen": torch.arange(3),
    }


def checkpoint(folder: Path, state: dict[str, torch.Tensor], *, shards: bool = False) -> Path:
    folder.mkdir(parents=True)
    if shards:
        for shard in set(SHARDS.values()):
            save_file({n: state[n] for n in state if SHARDS[n] == shard}, folder / shard)
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": SHARDS}))
    else:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "pytorch_model.bin").write_bytes(b"weights in another form")
    (folder / ".hidden").write_text("")
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "base", tensors(0))


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "library")


def saved(library: Library, base: Path, seed: int) -> Entry:
    return library.save_task(f"task-{seed}", base_digest(base), Checkpoint(base), tensors(seed))


def recipe(base: Path, *terms: tuple[Entry, float]) -> Recipe:
    return Recipe(base=base_digest(base), terms=tuple((e.digest, w) for e, w in terms))


def test_weight_one_is_the_tuned_checkpoint(library: Library, base: Path, tmp_path: Path) -> None:
    task = saved(library, base, 1)
    target = materialise(library, recipe(base, (task, 1.0)), base, tmp_path / "out")
    tuned = checkpoint(tmp_path / "tuned", tensors(1))
    assert base_digest(target) == base_digest(tuned)
    assert (target / "model.safetensors").read_bytes() == (tuned / "model.safetensors").read_bytes()
    assert sorted(p.name for p in target.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "workbench-recipe.json",
    ]


def test_two_terms_are_the_equation(library: Library, base: Path, tmp_path: Path) -> None:
    one, two = saved(library, base, 1), saved(library, base, 2)
    made = recipe(base, (one, 0.5), (two, -0.25))
    out = load_file(materialise(library, made, base, tmp_path / "out") / "model.safetensors")
    by_digest = {one.digest: tensors(1), two.digest: tensors(2)}
    for name, tensor in tensors(0).items():
        terms = [(w, by_digest[d][name]) for d, w in made.terms if name != "frozen"]
        assert torch.equal(out[name], combine(tensor, terms))


def test_removal_is_exact(library: Library, base: Path, tmp_path: Path) -> None:
    one, two = saved(library, base, 1), saved(library, base, 2)
    materialise(library, recipe(base, (one, 1.0), (two, 0.3)), base, tmp_path / "both")
    without = materialise(library, recipe(base, (one, 1.0), (two, 0.0)), base, tmp_path / "one")
    assert base_digest(without) == base_digest(checkpoint(tmp_path / "tuned", tensors(1)))
    nothing = materialise(library, recipe(base), base, tmp_path / "none")
    assert base_digest(nothing) == base_digest(base)


def floats(seed: int) -> dict[str, torch.Tensor]:
    return {**tensors(seed), "frozen": tensors(0)["frozen"]}


@pytest.mark.parametrize("method", METHODS)
def test_any_method_is_the_merge_of_the_deltas(
    library: Library, base: Path, tmp_path: Path, method: str
) -> None:
    digest, weights = base_digest(base), {1: 1.0, 2: -0.5, 3: 0.7}
    entries = {s: library.save_task(f"t{s}", digest, Checkpoint(base), floats(s)) for s in weights}
    partial = {"b": tensors(4)["b"]}  # one that leaves a tensor alone
    entries[4] = library.save_task("t4", digest, Checkpoint(base), partial)
    weights[4] = 1.0
    op = Operation.of(method, {"density": 0.6} if method == "ties" else {})
    terms = tuple((entries[s].digest, w) for s, w in weights.items())
    made = Recipe(op=op, base=digest, terms=terms)
    library.save_recipe("mix", made)
    assert library.load_recipe("mix")[1] == made
    out = load_file(materialise(library, made, base, tmp_path / "out") / "model.safetensors")
    start = tensors(0)
    moved = {s: ("a", "b") if s != 4 else ("b",) for s in weights}
    deltas = {
        entries[s].digest: (w, {n: delta(start[n], tensors(s)[n]) for n in moved[s]})
        for s, w in weights.items()
    }
    for name, x in merge(method, deltas, op.options).items():
        expected = torch.where(x == 0, start[name], (start[name].float() + x).to(start[name].dtype))
        assert torch.equal(out[name], expected)
    assert torch.equal(out["frozen"], start["frozen"])


def test_removal_is_exact_whatever_the_method(library: Library, base: Path, tmp_path: Path) -> None:
    digest = base_digest(base)
    one, two, three = (
        library.save_task(f"t{s}", digest, Checkpoint(base), floats(s)).digest for s in (1, 2, 3)
    )
    for method in METHODS:
        op = Operation.of(method, {})
        both = Recipe(op=op, base=digest, terms=((one, 1.0), (two, -0.5)))
        all_three = Recipe(op=op, base=digest, terms=(*both.terms, (three, 2.0)))
        assert without(all_three, three).digest == both.digest
        folders = [tmp_path / f"{method}-{i}" for i in range(2)]
        materialise(library, both, base, folders[0])
        materialise(library, without(all_three, three), base, folders[1])
        assert base_digest(folders[0]) == base_digest(folders[1])
        # These two point away from each other, so model stock stays at the base.
        assert (base_digest(folders[0]) == digest) == (method == "model-stock")


def test_ties_of_one_task_at_density_one_is_the_tuned_checkpoint(
    library: Library, base: Path, tmp_path: Path
) -> None:
    digest = base_digest(base)
    task = library.save_task("t1", digest, Checkpoint(base), floats(1)).digest
    recipe = Recipe(op=Operation.of("ties", {"density": 1}), base=digest, terms=((task, 1.0),))
    target = materialise(library, recipe, base, tmp_path / "out")
    assert base_digest(target) == base_digest(checkpoint(tmp_path / "tuned", floats(1)))


def test_integers_are_not_merged(library: Library, base: Path, tmp_path: Path) -> None:
    digest, state = base_digest(base), {**tensors(1), "frozen": torch.arange(3) + 1}
    task = library.save_task("t", digest, Checkpoint(base), state).digest
    for method in ("ties", "dare"):
        recipe = Recipe(op=Operation.of(method, {}), base=digest, terms=((task, 1.0),))
        with pytest.raises(ShapeMismatch, match="integers cannot be merged"):
            materialise(library, recipe, base, tmp_path / method)
        assert not (tmp_path / method).exists()


def test_shards_stay_shards(library: Library, tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", tensors(0), shards=True)
    target = materialise(
        library, recipe(base, (saved(library, base, 1), 1.0)), base, tmp_path / "o"
    )
    tuned = checkpoint(tmp_path / "tuned", tensors(1), shards=True)
    for name in ("model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"):
        assert (target / name).read_bytes() == (tuned / name).read_bytes()


def test_a_made_folder_is_left_alone(
    library: Library, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(base, (saved(library, base, 1), 1.0))
    shares: list[float] = []
    target = tmp_path / "deep" / "out"
    materialise(library, made, base, target, lambda share, _: shares.append(share))
    assert shares[-1] == 1.0
    assert shares == sorted(shares)
    monkeypatch.setattr(weights, "Checkpoint", lambda _: pytest.fail("made again"))
    assert materialise(library, made, base, target) == target
    with pytest.raises(NameTaken, match="was not made by this recipe"):
        materialise(library, recipe(base), base, target)


def test_what_does_not_fit(library: Library, base: Path, tmp_path: Path) -> None:
    task = saved(library, base, 1)
    other = checkpoint(tmp_path / "other", tensors(9))
    out = tmp_path / "out"
    with pytest.raises(ModelMismatch, match="give the folder of the recipe's own model"):
        materialise(library, recipe(base, (task, 1.0)), other, out)
    with pytest.raises(ModelMismatch, match="belongs to base"):
        materialise(library, recipe(other, (task, 1.0)), other, out)
    with pytest.raises(NameNotFound):
        materialise(library, Recipe(base=base_digest(base), terms=(("e" * 64, 1.0),)), base, out)
    digest = base_digest(base)
    state = tensors(0)
    ghost = library.save_task("ghost", digest, {"g": torch.zeros(1)}, {"g": torch.ones(1)})
    with pytest.raises(ShapeMismatch, match="'g', which the model"):
        materialise(library, recipe(base, (ghost, 1.0)), base, out)
    flat = library.save_task(
        "flat", digest, {"a": state["a"].reshape(-1)}, {"a": state["a"].reshape(-1) + 1}
    )
    with pytest.raises(ShapeMismatch, match=r"'a' as BF16 \[32\]"):
        materialise(library, recipe(base, (flat, 1.0)), base, out)
    assert not out.exists()
    assert not list(tmp_path.glob(".workbench-partial/*"))


def test_a_stop_or_a_full_disk_leaves_nothing(
    library: Library, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(base, (saved(library, base, 1), 1.0))
    out = tmp_path / "made" / "out"

    def stop(_: float, __: str) -> None:
        raise Cancelled("stopped by the user")

    with pytest.raises(Cancelled):
        materialise(library, made, base, out, stop)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OutOfSpace, match="free some space"):
            materialise(library, made, base, out)
    assert [p.name for p in out.parent.iterdir()] == [".workbench-partial.lock"]
    (out.parent / ".workbench-partial").mkdir()
    (out.parent / ".workbench-partial" / "left by a killed process").write_text("")
    assert materialise(library, made, base, out).is_dir()
    assert base_digest(out) == base_digest(checkpoint(tmp_path / "tuned", tensors(1)))
