"""LoRA: the change that PEFT itself makes, what is refused, and how near the fitted ones come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from vectors.errors import InputError, ShapeMismatch, VectorFileError
from vectors.formats.peft import CONFIG, WEIGHTS, fit_lora, read_lora

PROJ = "model.layers.0.self_attn.q_proj"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def models(kind: str) -> Any:
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        PretrainedConfig,
    )

    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": 40, "tie_word_embeddings": False}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=2, n_positions=32, **common))
    config: PretrainedConfig = LlamaConfig(
        hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, **common,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def base_of(model: Any) -> dict[str, torch.Tensor]:
    """The tensors under the names of a checkpoint."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "down_proj"]}),
        ("llama", {"target_modules": ["q_proj"], "use_rslora": True, "lora_alpha": 7}),
        (
            "llama",
            {
                "target_modules": ["q_proj", "v_proj"],
                "rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 6},
                "alpha_pattern": {"layers.0.self_attn.q_proj": 3},
            },
        ),
        ("llama", {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "norm"]}),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("gpt2", {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
    ],
)
def test_the_change_is_pefts(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = models(kind)
    base = base_of(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for seed, (name, weight) in enumerate(sorted(adapted.named_parameters())):
            if "lora_" in name or "modules_to_save" in name:
                weight.copy_(random(*weight.shape, seed=seed))
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    found = read_lora(tmp_path, base)
    merged = base_of(adapted.merge_and_unload())
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert set(found) == changed
    for name in changed:
        # PEFT multiplies in fp32; a reference in fp64 is nearer to ours than PEFT is.
        assert torch.allclose(found[name], merged[name], rtol=1e-5, atol=1e-5)


def adapter(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    given = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / CONFIG).write_text(json.dumps(given))
    if tensors is None:
        tensors = factors()
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(tensors))
    return folder


def factors(module: str = PROJ, down: Any = (2, 5), up: Any = (3, 2)) -> dict[str, torch.Tensor]:
    name = f"base_model.model.{module}"
    return {f"{name}.lora_A.weight": random(*down), f"{name}.lora_B.weight": random(*up, seed=1)}


BASE = {f"{PROJ}.weight": random(3, 5, seed=2), "lm_head.weight": random(3, 5, seed=3)}


def test_the_change_is_the_equation_in_fp64(tmp_path: Path) -> None:
    given = factors()
    down, up = given.values()
    expected = up.double() @ down.double() * 2.0
    found = read_lora(adapter(tmp_path), BASE)[f"{PROJ}.weight"]
    assert torch.equal(found, BASE[f"{PROJ}.weight"] + expected.float())
    half = {name: tensor.bfloat16() for name, tensor in BASE.items()}
    rounded = read_lora(adapter(tmp_path), half)[f"{PROJ}.weight"]
    exact = half[f"{PROJ}.weight"].float() + expected.float()
    assert torch.equal(rounded, exact.bfloat16())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"something_new": {"a": 1}}, "something_new"),
        ({"rank_pattern": {"(a+)+$": 2}}, "pattern"),
        ({"r": 0}, "r:"),
        ({"r": "two"}, "r:"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
    ],
)
def test_what_is_not_plain_lora_is_refused(
    config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(VectorFileError) as caught:
        read_lora(adapter(tmp_path, **config), BASE)
    assert words in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("tensors", "error", "words"),
    [
        (factors("model.layers.9.x"), ShapeMismatch, "does not have"),
        (factors(down=(3, 5)), ShapeMismatch, "rank 2"),
        (factors(down=(2, 5), up=(3, 3)), ShapeMismatch, "rank 2"),
        (dict(list(factors().items())[:1]), VectorFileError, "lacks the other"),
        ({}, VectorFileError, "changes nothing"),
        (
            {**factors(), "base_model.model.lm_head.weight": random(3, 5)},
            VectorFileError,
            "lm_head",
        ),
        (
            {**factors(), f"base_model.model.{PROJ}.lora_magnitude_vector": random(3)},
            VectorFileError,
            "DoRA",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    tensors: dict[str, torch.Tensor], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        read_lora(adapter(tmp_path, tensors), BASE)


def test_what_shows_only_when_it_is_computed(tmp_path: Path) -> None:
    wide = read_lora(adapter(tmp_path, factors(down=(2, 6))), BASE)
    with pytest.raises(ShapeMismatch, match=r"\[3, 6\]"):
        _ = wide[f"{PROJ}.weight"]
    bad = factors()
    bad[f"base_model.model.{PROJ}.lora_A.weight"][0, 0] = float("nan")
    with pytest.raises(VectorFileError, match="finite"):
        _ = read_lora(adapter(tmp_path, bad), BASE)[f"{PROJ}.weight"]
    saved = {**factors(), "base_model.model.lm_head.weight": random(4, 5)}
    kept = read_lora(adapter(tmp_path, saved, modules_to_save=["lm_head"]), BASE)
    with pytest.raises(ShapeMismatch, match=r"\[4, 5\]"):
        _ = kept["lm_head.weight"]
    with pytest.raises(ShapeMismatch, match="both embedding and output head"):
        read_lora(adapter(tmp_path, saved, modules_to_save=["lm_head"]), BASE, tied=True)


def test_damaged_folders(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(VectorFileError, match="not a whole safetensors"):
        read_lora(folder, BASE)
    (folder / WEIGHTS).write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(VectorFileError, match="not a whole safetensors"):
        read_lora(folder, BASE)
    (folder / WEIGHTS).unlink()
    with pytest.raises(VectorFileError, match="not a whole safetensors"):
        read_lora(folder, BASE)
    for text in ("", "[]", "[" * 100_000):
        (folder / CONFIG).write_text(text)
        with pytest.raises(VectorFileError, match="not a valid LoRA"):
            read_lora(folder, BASE)


# -- out ----------------------------------------------------------------------------------------


def test_a_low_rank_change_comes_back_whole(tmp_path: Path) -> None:
    base = {f"model.layers.{i}.mlp.up_proj.weight": random(200, 90, seed=i) for i in range(2)}
    delta = random(200, 3, seed=7) @ random(3, 90, seed=8)
    tuned = {name: tensor + delta for name, tensor in base.items()}
    fit = fit_lora(base, tuned, list(base), error=1e-3)
    assert fit.rank == 3 and fit.error < 1e-5 and not fit.left_out
    for name, data in fit.files.items():
        (tmp_path / name).write_bytes(data)
    back = read_lora(tmp_path, base)
    for name in base:
        assert torch.allclose(back[name], tuned[name], atol=1e-4)
    again = fit_lora(base, tuned, list(base), error=1e-3)
    assert again.files[CONFIG] == fit.files[CONFIG]
    assert json.loads(fit.files[CONFIG])["target_modules"] == ["up_proj"]


@pytest.mark.parametrize("error", [0.5, 0.1, 0.01])
def test_the_bound_is_kept_and_the_error_is_the_files(error: float, tmp_path: Path) -> None:
    base = {"a.x.weight": random(96, 80), "a.y.weight": random(40, 96, seed=1)}
    tuned = {
        name: tensor + random(*tensor.shape, seed=5) * 0.9 ** torch.arange(tensor.shape[1])
        for name, tensor in base.items()
    }
    fit = fit_lora(base, tuned, list(base), error=error)
    assert fit.error <= error
    for name, data in fit.files.items():
        (tmp_path / name).write_bytes(data)
    back = read_lora(tmp_path, {name: t.double() for name, t in base.items()})
    lost = sum(float((back[n].double() - tuned[n].double()).square().sum()) for n in base)
    size = sum(float((tuned[n].double() - base[n].double()).square().sum()) for n in base)
    assert (lost / size) ** 0.5 == pytest.approx(fit.error, rel=0.02, abs=1e-5)


def test_what_a_lora_cannot_hold_is_counted() -> None:
    base = {"a.q.weight": random(6, 8), "norm.weight": random(8), "a.b.weight": random(6, 8)}
    tuned = {"a.q.weight": base["a.q.weight"] + 1, "norm.weight": base["norm.weight"] + 1}
    fit = fit_lora(base, tuned, list(tuned), rank=1)
    assert fit.left_out == ("norm.weight",)
    assert fit.error == pytest.approx((8 / (48 + 8)) ** 0.5, rel=1e-4)
    assert fit.errors["norm.weight"] == 1
    with pytest.raises(InputError, match="cannot hold 1 of the tensors"):
        fit_lora(base, tuned, list(tuned), error=0.1)
    with pytest.raises(InputError, match="No linear layer"):
        fit_lora(base, tuned, ["norm.weight"], rank=1)
    for wrong in ({}, {"rank": 1, "error": 0.1}, {"rank": 0}, {"error": 1.5}, {"error": 0.0}):
        with pytest.raises(InputError):
            fit_lora(base, tuned, list(tuned), **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_loads_what_is_written(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = models(kind)
    base = base_of(model)
    leaf = "c_attn" if kind == "gpt2" else "q_proj"
    names = [name for name in base if name.endswith(f"{leaf}.weight")]
    tuned = dict(base)
    for name in names:
        rows, columns = base[name].shape
        tuned[name] = base[name] + random(rows, 2, seed=1) @ random(2, columns, seed=2)
    fit = fit_lora(base, tuned, names, rank=2, inputs_first=kind == "gpt2")
    for name, data in fit.files.items():
        (tmp_path / name).write_bytes(data)
    merged = base_of(peft.PeftModel.from_pretrained(model, str(tmp_path)).merge_and_unload())
    for name in base:
        assert torch.allclose(merged[name], tuned[name], atol=1e-4)
