"""The library's entries, out and in, on a real tiny model; and the command line on top."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from vectors.errors import (
    BlockNotFound,
    GrammarError,
    InputError,
    ModelMismatch,
    NameTaken,
    ShapeMismatch,
    VectorFileError,
)
from vectors.formats.control_vector import control_vector_bytes
from vectors.formats.gguf import Kind, write_gguf
from vectors.formats.peft import CONFIG, WEIGHTS
from vectors.formats.persona import persona_bytes
from vectors.store import base_digest
from vectors.store.checkpoint import Checkpoint
from vectors.types import SteeringVector
from workbench.cli import main
from workbench.service import Workbench


@pytest.fixture
def wb(tmp_path: Path, tiny_folder: Path) -> Workbench:
    """A workbench with an empty library, on the tiny model."""
    home = tmp_path / "home"
    shutil.copytree(tiny_folder, home / "models" / "tiny")
    return Workbench(home, "tiny")


@pytest.fixture
def vector(wb: Workbench) -> SteeringVector:
    rng = torch.Generator().manual_seed(1)
    rows = {b: torch.randn(64, generator=rng) for b in range(4)}
    made = SteeringVector(
        wb.model().base,
        {b: v / v.norm() for b, v in rows.items()},
        {b: 1.5 + b for b in rows},
        2,
        {"method": "mean-difference"},
    )
    wb.library.save_vector("mine", made)
    return made


@pytest.fixture
def tuned(wb: Workbench, tmp_path: Path) -> Path:
    """A fine-tuned checkpoint of the tiny model: two tensors have moved."""
    folder = tmp_path / "tuned"
    shutil.copytree(wb.model().folder, folder)
    tensors = {name: tensor.clone() for name, tensor in Checkpoint(folder).items()}
    rng = torch.Generator().manual_seed(2)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        tensors[name] += (torch.randn(tensors[name].shape, generator=rng) * 0.05).bfloat16()
    data = safetensors.torch.save(tensors, metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(data)
    return folder


# -- steering vectors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "format", "blocks"),
    [
        ("v.safetensors", "auto", [0, 1, 2, 3]),
        ("v.gguf", "auto", [2]),
        ("v.gguf", "gguf-shifted", [2]),
        ("v.st", "persona", [0, 1, 2, 3]),
    ],
)
def test_out_and_in_again(
    file: str, format: str, blocks: list[int], wb: Workbench, vector: SteeringVector, tmp_path: Path
) -> None:
    path = tmp_path / file
    told = wb.export("mine", path, format=format)
    assert told["blocks"] == blocks and told["bytes"] == path.stat().st_size
    wb.import_(path, "back")
    back = wb.library.load_vector("back")[1]
    assert (back.base, back.best_block, sorted(back.directions)) == (vector.base, 2, blocks)
    for block in blocks:
        assert torch.allclose(back.addition(block, 0.3), vector.addition(block, 0.3), atol=1e-6)
    with pytest.raises(NameTaken, match="--force"):
        wb.export("mine", path, format=format)
    wb.export("mine", path, format=format, force=True)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [file]


def repeng(wb: Workbench, hint: str = "llama", blocks: tuple[int, ...] = (1, 2)) -> bytes:
    rng = torch.Generator().manual_seed(4)
    rows = {f"direction.{b}": torch.randn(64, generator=rng) for b in blocks}
    values = [
        ("general.architecture", Kind.STRING, "controlvector"),
        ("controlvector.model_hint", Kind.STRING, hint),
        ("controlvector.layer_count", Kind.UINT32, len(rows)),
    ]
    return write_gguf(values, rows)


def test_a_vector_without_doses_gets_none_silently(
    wb: Workbench, vector: SteeringVector, tmp_path: Path
) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(repeng(wb))
    with pytest.raises(InputError, match=r"--contrast.*--like.*--unit"):
        wb.import_(path, "theirs")
    with pytest.raises(InputError, match="choose one"):
        wb.import_(path, "theirs", unit="file", like="mine")
    with pytest.raises(BlockNotFound, match="--block"):
        wb.import_(path, "theirs", unit="file")
    with pytest.raises(BlockNotFound, match="block 3"):
        wb.import_(path, "theirs", unit="file", block=3)
    wb.import_(path, "theirs", unit="file", block=1)
    entry, made = wb.library.load_vector("theirs")
    raw = control(path)
    assert torch.allclose(made.addition(1, 1.0), raw[1], rtol=1e-5)
    assert entry.info["imported"]["dose_unit"] == "file"
    wb.import_(path, "alike", like="mine")
    entry, made = wb.library.load_vector("alike")
    assert made.mean_norms == {1: 2.5, 2: 3.5} and made.best_block == 2
    dose = entry.info["imported"]["strength_one_is_dose"]["2"]
    assert torch.allclose(made.addition(2, dose), raw[2], rtol=1e-4, atol=1e-5)


def control(path: Path) -> dict[int, torch.Tensor]:
    from vectors.formats.control_vector import read_control_vector

    return dict(read_control_vector(path.read_bytes(), "f").directions)


def test_a_contrast_set_measures_the_doses(wb: Workbench, tmp_path: Path) -> None:
    from vectors.types import Method
    from workbench.extract.extract import extract
    from workbench.extract.readers import ModelReader
    from workbench.models.loading import load_model

    reader = ModelReader(load_model(wb.model()))
    made = extract(reader, wb.contrast.get("brief"), method=Method.MEAN_DIFFERENCE)
    path = tmp_path / "v.svec"
    directions = {str(b): v.tolist() for b, v in made.vector.directions.items()}
    path.write_text(json.dumps({"model_type": "llama", "directions": directions}))
    told = wb.import_(path, "measured", contrast="brief")
    entry, found = wb.library.load_vector("measured")
    # The same set on the same model gives what extraction here would have.
    assert found.best_block == made.vector.best_block
    assert dict(found.mean_norms) == pytest.approx(dict(made.vector.mean_norms))
    assert {"contrast.jsonl", "diagnostics.json"} <= set(entry.manifest.files)
    assert entry.info["imported"]["dose_unit"] == "measured"
    assert any("final norm" in note for note in told["notes"])


def test_what_was_made_for_another_model(
    wb: Workbench, vector: SteeringVector, tmp_path: Path
) -> None:
    other = SteeringVector("cd" * 32, vector.directions, vector.mean_norms, 2)
    path = tmp_path / "v"
    path.write_bytes(control_vector_bytes(other, [1, 2]))
    with pytest.raises(ModelMismatch, match="made for base cdcdcd"):
        wb.import_(path, "x", unit="file", block=1)
    path.write_bytes(repeng(wb, hint="mistral"))
    with pytest.raises(ModelMismatch, match="'mistral'"):
        wb.import_(path, "x", unit="file", block=1)
    wb.import_(path, "x", unit="file", block=1, ignore_hint=True)
    path.write_bytes(repeng(wb, blocks=(1, 4)))
    with pytest.raises(BlockNotFound, match="0 to 3"):
        wb.import_(path, "x", unit="file", block=1)
    for rows, words in (((4, 64), "3 blocks"), ((5, 32), "width 32")):
        data = safetensors.torch.save({"v": torch.ones(rows)})
        path.write_bytes(data)
        with pytest.raises(ShapeMismatch, match=words):
            wb.import_(path, "x", format="persona", unit="file", block=1)
    path.write_bytes(persona_bytes(vector))
    with pytest.raises(InputError, match="unit"):
        wb.import_(path, "x", unit="volts")
    wb.library.save_vector("foreign", other)
    with pytest.raises(ModelMismatch, match="belongs to base cdcdcd"):
        wb.export("foreign", tmp_path / "f.gguf")
    path.write_bytes(repeng(wb))
    with pytest.raises(ModelMismatch, match="belongs to base cdcdcd"):
        wb.import_(path, "x", like="foreign")


def test_blocks_of_an_export(wb: Workbench, vector: SteeringVector, tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    for text, blocks in (("best", [2]), ("1-2", [1, 2]), ("3", [3])):
        assert wb.export("mine", path, blocks=text, force=True)["blocks"] == blocks
    for text, error in (("all", BlockNotFound), ("9", InputError), ("x", InputError)):
        with pytest.raises(error):
            wb.export("mine", path, blocks=text, force=True)
    with pytest.raises(InputError, match="leave --blocks out"):
        wb.export("mine", tmp_path / "v.safetensors", blocks="2")
    with pytest.raises(InputError, match="does not show the format"):
        wb.export("mine", tmp_path / "v.bin")
    with pytest.raises(InputError, match="rank"):
        wb.export("mine", tmp_path / "n.gguf", rank=3)


def test_force_replaces_files_only(wb: Workbench, vector: SteeringVector, tmp_path: Path) -> None:
    folder = tmp_path / "v.gguf"
    folder.mkdir()
    with pytest.raises(NameTaken, match="not something that an export made"):
        wb.export("mine", folder, force=True)
    kept = tmp_path / "kept"
    kept.write_text("mine")
    link = tmp_path / "l.gguf"
    link.symlink_to(kept)
    with pytest.raises(NameTaken):
        wb.export("mine", link, force=True)
    assert kept.read_text() == "mine"
    with pytest.raises(GrammarError):
        wb.import_(kept, "../x")


# -- task vectors -------------------------------------------------------------------------------


def test_a_checkpoint_in_and_out_is_itself(wb: Workbench, tuned: Path, tmp_path: Path) -> None:
    told = wb.import_(tuned, "task")
    entry = wb.library.get("task")
    assert told["kind"] == "task-vector"
    assert sorted(entry.manifest.tensors) == [
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
    ]
    out = tmp_path / "out"
    wb.export("task", out)
    assert base_digest(out) == base_digest(tuned)
    same = (out / "model.safetensors").read_bytes() == (tuned / "model.safetensors").read_bytes()
    assert same
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= {
        p.name for p in out.iterdir()
    }
    assert not [p for p in out.iterdir() if p.name.startswith(".")]
    assert not list(tmp_path.glob(".*half"))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoTokenizer.from_pretrained(out).chat_template
    logits = [
        AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([[5, 6, 7]])).logits
        for folder in (tuned, out)
    ]
    assert torch.equal(*logits)
    with pytest.raises(NameTaken):
        wb.export("task", out)
    wb.export("task", out, force=True)
    assert base_digest(out) == base_digest(tuned)
    with pytest.raises(NameTaken, match="not something that an export made"):
        wb.export("task", tuned, force=True)


def test_a_recipe_goes_out_as_a_checkpoint(wb: Workbench, tuned: Path, tmp_path: Path) -> None:
    wb.import_(tuned, "task")
    wb.negate("task", "opposite")
    wb.export("opposite", tmp_path / "out")
    base, made, theirs = (Checkpoint(f) for f in (wb.model().folder, tmp_path / "out", tuned))
    name = "model.norm.weight"
    mirrored = base[name].float() - (theirs[name].float() - base[name].float())
    assert torch.equal(made[name], mirrored.bfloat16())


def save(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in Checkpoint(folder).items()}
    change(tensors)
    data = safetensors.torch.save(tensors, metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(data)


HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


def test_checkpoints_that_are_not_of_this_base(wb: Workbench, tuned: Path) -> None:
    save(tuned, lambda t: t.update({HEAD: t[EMBED].clone()}))
    wb.import_(tuned, "tied")
    assert HEAD not in wb.library.get("tied").manifest.tensors
    save(tuned, lambda t: t[HEAD].add_(1))
    with pytest.raises(ShapeMismatch, match="has 1 tensors that the base does not have"):
        wb.import_(tuned, "x")
    save(tuned, lambda t: (t.pop(HEAD), t.pop("model.norm.weight")))
    with pytest.raises(ShapeMismatch, match="lacks 1"):
        wb.import_(tuned, "x")
    save(tuned, lambda t: t.update({"model.norm.weight": torch.ones(64)}))
    with pytest.raises(ShapeMismatch, match=r"torch.float32"):
        wb.import_(tuned, "x")
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    with pytest.raises(ModelMismatch, match="mistral"):
        wb.import_(tuned, "x")
    (tuned / "config.json").write_text(json.dumps(config))
    tokens = (tuned / "tokenizer.json").read_text()
    (tuned / "tokenizer.json").write_text(tokens.replace('"<|user|>"', '"<|other|>"'))
    with pytest.raises(ModelMismatch, match="vocabulary"):
        wb.import_(tuned, "x")
    with pytest.raises(InputError, match="is tiny itself"):
        wb.import_(wb.model().folder, "x")
    (tuned / CONFIG).write_text("{}")
    with pytest.raises(VectorFileError, match="both an adapter"):
        wb.import_(tuned, "x")
    assert [row["name"] for row in wb.library_rows()] == ["tied"]


def test_a_lora_in_and_out(wb: Workbench, tmp_path: Path) -> None:
    module = "base_model.model.model.layers.1.self_attn.q_proj"
    rng = torch.Generator().manual_seed(3)
    tensors = {
        f"{module}.lora_A.weight": torch.randn(2, 64, generator=rng) * 0.1,
        f"{module}.lora_B.weight": torch.randn(64, 2, generator=rng),
    }
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(tensors))
    wb.import_(folder, "adapter")
    told = wb.export("adapter", tmp_path / "same", format="lora")
    assert told["as_imported"]
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "same" / name).read_bytes() == (folder / name).read_bytes()
    fitted = wb.export("adapter", tmp_path / "fit", format="lora", rank=2)
    # Rounding to bf16 is what two directions cannot hold.
    assert 0 < fitted["error"] < 0.01 and fitted["rank"] == 2
    noted = json.loads((tmp_path / "fit" / "workbench-export.json").read_text())
    assert noted["error"] == fitted["error"]
    wb.export("adapter", tmp_path / "fit", format="lora", rank=1, force=True)
    with pytest.raises(InputError, match="'gguf'"):
        wb.export("adapter", tmp_path / "g", format="gguf")


def test_a_mergekit_recipe(wb: Workbench, tuned: Path, tmp_path: Path) -> None:
    wb.import_(tuned, "task")
    text = """
merge_method: task_arithmetic
base_model: tiny
models:
  - model: org/tuned
    parameters: {weight: 0.5}
"""
    path = tmp_path / "m.yml"
    path.write_text(text)
    with pytest.raises(InputError, match="--term 'org/tuned=NAME'"):
        wb.import_(path, "half")
    with pytest.raises(InputError, match="no model 'other'"):
        wb.import_(path, "half", terms={"other": "task"})
    wb.import_(path, "half", terms={"org/tuned": "task"})
    _, recipe = wb.library.load_recipe("half")
    assert recipe.terms == ((wb.library.get("task").digest, 0.5),)
    path.write_text(text.replace("tiny", "org/else"))
    with pytest.raises(ModelMismatch, match="org/else"):
        wb.import_(path, "x", terms={"org/tuned": "task"})
    wb.import_(path, "x", terms={"org/tuned": "task"}, ignore_hint=True)
    path.write_text(
        text.replace("task_arithmetic", "ties").replace("weight: 0.5", "weight: 0.5, density: 0.3")
    )
    wb.import_(path, "trimmed", terms={"org/tuned": "task"})
    _, recipe = wb.library.load_recipe("trimmed")
    assert recipe.op.method == "ties" and recipe.op.options["density"] == 0.3
    assert (wb.home.weights / wb.weights("trimmed=1") / "config.json").is_file()


# -- the command line ---------------------------------------------------------------------------


def test_the_command_line(
    wb: Workbench, vector: SteeringVector, tuned: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def run(*arguments: Any) -> tuple[int, dict[str, Any]]:
        shared = ["--json", "--home", str(wb.home.root), "--model", "tiny"]
        code = main(["library", *map(str, arguments), *shared])
        return code, json.loads(capsys.readouterr().out)

    gguf, folder = tmp_path / "v.gguf", tmp_path / "out"
    assert run("export", "mine", gguf)[1]["format"] == "gguf"
    code, told = run("export", "mine", gguf)
    assert (code, told["error"]["kind"]) == (2, "NameTaken")
    assert run("import", gguf, "--name", "again")[1]["revision"] == 1
    assert run("import", tuned, "--name", "task")[1]["format"] == "checkpoint"
    assert run("export", "task", folder)[0] == 0
    told = run("export", "task", tmp_path / "lora", "--format", "lora", "--rank", "4")[1]
    assert told["left_out"] == ["model.norm.weight"] and told["error"] > 0.5
    assert run("import", gguf, "--name", "x", "--term", "nonsense")[0] == 2
    shared = ["--home", str(wb.home.root), "--model", "tiny"]
    assert main(["library", "export", "task", str(folder), "--force", *shared]) == 0
    assert "Wrote task" in capsys.readouterr().out
