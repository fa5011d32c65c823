"""LoRA adapters of PEFT: the exact change that one means, and the nearest one to a change.

A folder with `adapter_config.json` and `adapter_model.safetensors`. A module's weight `W` becomes
`W + s B A`, with `s = alpha / r`, or `alpha / sqrt(r)` for rank-stabilised LoRA. Weights that are
kept inputs first (`fan_in_fan_out`) and embeddings take the transpose.

Source: Hu et al., "LoRA" (arXiv:2106.09685); Kalajdzievski, "rsLoRA" (arXiv:2312.03732).

Shape letters: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vectors.errors import InputError, ShapeMismatch, VectorFileError
from vectors.tasks.lowrank import low_rank

__all__ = ["CONFIG", "WEIGHTS", "Adapter", "LoraFit", "fit_changes", "fit_lora", "read_lora"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?")
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "lm_head")
MOST_CONFIG = 1 << 20

# Of the configuration's fields, those that say nothing about what the saved factors mean.
SILENT = frozenset(
    {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
        *("revision", "inference_mode", "lora_dropout", "target_modules", "exclude_modules"),
        *("layers_to_transform", "layers_pattern", "megatron_core", "loftq_config", "eva_config"),
        *("corda_config", "lora_ga_config", "qalora_group_size", "runtime_config"),
        "ensure_weight_tying",
    }
)
# These begin from a changed base, so that the saved factors are relative to another model.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")


class _Config(BaseModel):
    model_config = ConfigDict(extra="allow")

    peft_type: Literal["LORA"]
    r: Annotated[int, Field(ge=1, le=1 << 16)]
    lora_alpha: FiniteFloat
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=1 << 16)]] | None = None
    alpha_pattern: dict[str, FiniteFloat] | None = None
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    bias: Literal["none"] = "none"
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True


@dataclass(frozen=True)
class _Change:
    """What becomes of one tensor: factors at a scaling, or another tensor in its place."""

    down: str = ""
    up: str = ""
    scaling: float = 1.0
    turned: bool = False
    whole: str = ""


class Adapter(Mapping[str, Tensor]):
    """The tensors that an adapter changes, merged into the base; each look-up computes one.

    `W + fp32(s B A)`, with the product in fp64 and the sum in fp32, rounded once to the base's
    type. PEFT's own merge rounds the product to the factors' type first.
    """

    def __init__(
        self, path: Path, base: Mapping[str, Tensor], changes: Mapping[str, _Change]
    ) -> None:
        self._path, self._base, self._changes = path, base, dict(changes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._changes)

    def __len__(self) -> int:
        return len(self._changes)

    def __getitem__(self, name: str) -> Tensor:
        change, base = self._changes[name], self._base[name]
        with safe_open(self._path, framework="pt") as file:
            if change.whole:
                found = _finite(file.get_tensor(change.whole), change.whole)
                if found.shape != base.shape:
                    raise ShapeMismatch(
                        f"The adapter saves '{name}' as {list(found.shape)} and the base has "
                        f"{list(base.shape)}; use its own base."
                    )
                return found.to(base.dtype)
            down_RI = _finite(file.get_tensor(change.down), change.down)
            up_OR = _finite(file.get_tensor(change.up), change.up)
        delta = (up_OR.double() @ down_RI.double()) * change.scaling
        delta = delta.T if change.turned else delta
        if delta.shape != base.shape:
            raise ShapeMismatch(
                f"The adapter changes '{name}' by {list(delta.shape)} and the base has "
                f"{list(base.shape)}; use its own base."
            )
        return (base.float() + delta.float()).to(base.dtype)


def read_lora(folder: Path, base: Mapping[str, Tensor], tied: bool = False) -> Adapter:
    """Return what the adapter in `folder` makes of the tensors of `base`.

    Args:
        tied: the base's output head is its embedding; an adapter of the embedding alone then means
            something that no checkpoint can hold, and is refused.

    Raises:
        VectorFileError: not a whole adapter, or one of a kind that is not plain LoRA.
        ShapeMismatch: a module or shape that the base does not have.
    """
    config = _config(folder / CONFIG)
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise VectorFileError(
            f"{path} is not a whole safetensors file ({error}); save the adapter again as "
            "safetensors."
        ) from error
    sides: dict[str, dict[str, str]] = {}
    changes: dict[str, _Change] = {}
    for key in sorted(shapes):
        match = FACTOR.fullmatch(key.removeprefix(PREFIX))
        if match is not None:
            embedding = match["embedding"] is not None
            sides.setdefault(match["module"], {"embedding": str(embedding)})[match["side"]] = key
            continue
        name = key.removeprefix(PREFIX).replace(".modules_to_save.", ".")
        module = name.rpartition(".")[0]
        # PEFT compares ends of names as text, without regard to the dots.
        if not any(module.endswith(kept) for kept in config.modules_to_save or () if kept):
            what = "DoRA" if "magnitude" in key else "no LoRA factor"
            raise VectorFileError(
                f"{path} has a tensor {key[:100]!r} ({what}); only plain LoRA adapters are "
                "supported, so merge it with PEFT and import the checkpoint."
            )
        _known(name, base, path, tied)
        changes[name] = _Change(whole=key)
    for module, side in sides.items():
        if not {"A", "B"} <= set(side):
            raise VectorFileError(
                f"{path} has one factor of {module[:80]!r} and lacks the other; save it again."
            )
        name = f"{module}.weight"
        _known(name, base, path, tied)
        rank = _pattern(config.rank_pattern or {}, module, config.r)
        alpha = _pattern(config.alpha_pattern or {}, module, config.lora_alpha)
        down, up = shapes[side["A"]], shapes[side["B"]]
        if len(down) != 2 or len(up) != 2 or down[0] != rank or up[1] != rank:
            raise ShapeMismatch(
                f"{path} has factors {list(down)} and {list(up)} for {module[:80]!r}, which its "
                f"configuration gives rank {rank}; save the adapter again."
            )
        turned = config.fan_in_fan_out or side["embedding"] == "True"
        scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        changes[name] = _Change(side["A"], side["B"], scaling, turned)
    if not changes:
        raise VectorFileError(f"{path} changes nothing; check that the adapter was saved.")
    return Adapter(path, base, changes)


def _config(path: Path) -> _Config:
    try:
        if path.stat().st_size > MOST_CONFIG:
            raise VectorFileError(f"{path} is far larger than a configuration; check the adapter.")
        raw = json.loads(path.read_bytes())
        if isinstance(raw, dict) and raw.get("peft_type") not in ("LORA", None):
            raise VectorFileError(
                f"{path} is a {str(raw['peft_type'])[:40]} adapter, and only LoRA is supported; "
                "merge it with PEFT and import the checkpoint."
            )
        if isinstance(raw, dict) and raw.get("bias", "none") != "none":
            raise VectorFileError(_unsupported(path, "trained biases (bias)"))
        config = _Config.model_validate(raw)
    except (OSError, ValueError, RecursionError) as error:
        row = error.errors()[0] if isinstance(error, ValidationError) else None
        words = f"{'.'.join(map(str, row['loc']))[:80]}: {row['msg']}" if row else str(error)[:120]
        raise VectorFileError(
            f"{path} is not a valid LoRA configuration ({words}); save the adapter again."
        ) from error
    if config.init_lora_weights not in PLAIN_STARTS:
        raise VectorFileError(
            _unsupported(path, f"init_lora_weights {config.init_lora_weights!r:.40}")
        )
    for name, value in sorted((config.model_extra or {}).items()):
        if value and name not in SILENT:
            words = "DoRA (use_dora)" if name == "use_dora" else name[:60]
            raise VectorFileError(_unsupported(path, words))
    return config


def _unsupported(path: Path, what: str) -> str:
    return (
        f"{path} uses {what}, which is not plain LoRA; merge it with PEFT and import the "
        "checkpoint."
    )


def _known(name: str, base: Mapping[str, Tensor], path: Path, tied: bool) -> None:
    if name not in base:
        raise ShapeMismatch(
            f"{path} changes '{name[:100]}', which the base does not have; "
            "give the adapter's own base with --model."
        )
    if tied and name.rpartition(".")[0].rpartition(".")[2] in EMBEDDINGS:
        raise ShapeMismatch(
            f"{path} changes '{name[:100]}', which in this base is both embedding and output head; "
            "merge it with PEFT and import the checkpoint."
        )


def _pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first key that the module's name ends in; keys are regular expressions."""
    for key, value in patterns.items():
        # Keys that are plain paths are compared as text: a pattern from outside could be slow.
        if re.fullmatch(r"[\w.]+", key):
            if f".{module}".endswith(f".{key}"):
                return value
        else:
            raise VectorFileError(
                f"The adapter's configuration has the pattern {key[:60]!r}; only module names are "
                "supported there, so merge it with PEFT and import the checkpoint."
            )
    return default


def _finite(tensor: Tensor, name: str) -> Tensor:
    if not tensor.dtype.is_floating_point or not torch.isfinite(tensor.float()).all():
        raise VectorFileError(
            f"The adapter has values that are not finite numbers in '{name[:100]}'; "
            "train it again, or use an earlier checkpoint."
        )
    return tensor


# -- out ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoraFit:
    """The nearest LoRA to a change, and what it loses.

    Args:
        files: name to bytes of the adapter's folder.
        rank: of every module.
        error: `|delta - B A| / |delta|` over all tensors, those left out included.
        errors: the same for each tensor; 1 for those left out.
        left_out: tensors that a LoRA of linear layers cannot hold: norms, biases, embeddings.
        norms: `|B A|` of each module.
    """

    files: Mapping[str, bytes]
    rank: int
    error: float
    errors: Mapping[str, float]
    left_out: tuple[str, ...]
    norms: Mapping[str, float]


def fit_lora(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    names: Sequence[str],
    *,
    rank: int | None = None,
    error: float | None = None,
    seed: int = 0,
    base_name: str = "",
    inputs_first: bool = False,
) -> LoraFit:
    """Return the LoRA nearest to `tuned - base`, by a randomised singular value decomposition.

    Args:
        names: the tensors that differ.
        rank: of every module, or less where a matrix is smaller; or
        error: the largest `|delta - B A| / |delta|` that may be lost; the rank follows.
        inputs_first: the base keeps its linear weights transposed, as GPT-2 does.

    Raises:
        InputError: neither or both of rank and error, out of bounds, nothing to fit, or an error
            that cannot be kept because tensors have to be left out.
    """
    changes = ((name, base[name], tuned[name]) for name in sorted(names))
    return fit_changes(
        changes,
        base,
        rank=rank,
        error=error,
        seed=seed,
        base_name=base_name,
        inputs_first=inputs_first,
    )


def fit_changes(
    changes: Iterable[tuple[str, Tensor, Tensor]],
    names: Iterable[str],
    *,
    rank: int | None = None,
    error: float | None = None,
    seed: int = 0,
    base_name: str = "",
    inputs_first: bool = False,
    holds: Callable[[str], bool] = lambda name: True,
) -> LoraFit:
    """Return the same as `fit_lora`, looking at one tensor at a time.

    Args:
        changes: the name of each tensor that differs, the base's and the tuned one.
        names: of all tensors of the base.
        holds: of linear weights, whether the reader of the adapter can hold this one.

    Raises:
        InputError: see `fit_lora`.
    """
    if (rank is None) == (error is None):
        raise InputError("Give either a rank or the largest error of the LoRA.")
    if rank is not None and not 1 <= rank <= 1 << 14:
        raise InputError(f"The rank must lie between 1 and {1 << 14}, not {rank}; try 16.")
    if error is not None and not 0 < error < 1:
        raise InputError(f"The error must lie between 0 and 1, not {error}; try 0.05.")
    lost: dict[str, float] = {}
    sizes: dict[str, float] = {}
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    norms: dict[str, float] = {}
    for name, base, tuned in changes:
        delta = tuned.float() - base.float()
        sizes[name] = float(delta.double().square().sum())
        if not math.isfinite(sizes[name]):
            raise InputError(
                f"'{name}' changes by something that is not finite; a LoRA cannot hold it."
            )
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        linear = delta.dim() == 2 and name.endswith(".weight") and leaf not in EMBEDDINGS
        if not linear or not holds(name):
            lost[name] = sizes[name]
        elif sizes[name]:
            delta = delta.T.contiguous() if inputs_first else delta
            fit = low_rank(delta, rank=rank, error=error, seed=seed)
            pairs[name] = fit.up_OR, fit.down_RI
            norms[name] = _norm(fit.up_OR, fit.down_RI)
            lost[name] = fit.error**2 * sizes[name]
    whole = sum(sizes.values())
    if not pairs or not whole:
        raise InputError(
            "No linear layer changes, so there is nothing that a LoRA could hold; "
            "export a checkpoint."
        )
    left_out = tuple(name for name in lost if name not in pairs and sizes[name])
    total = math.sqrt(sum(lost.values()) / whole)
    if error is not None and total > error:
        raise InputError(
            f"A LoRA cannot hold {len(left_out)} of the tensors that change ({left_out[0]}, ...), "
            f"so it loses {total:.3g} and not {error:g} at most; give --rank to accept that, or "
            "export a checkpoint."
        )
    most = max(down.shape[0] for _, down in pairs.values())
    return LoraFit(
        files=_files(pairs, most, names, base_name, inputs_first),
        rank=most,
        error=total,
        errors={n: math.sqrt(lost[n] / sizes[n]) if sizes[n] else 0.0 for n in lost},
        left_out=left_out,
        norms=norms,
    )


def _norm(up_OR: Tensor, down_RI: Tensor) -> float:
    """`|B A|` by the factors' Gram matrices; the product itself is never formed."""
    up, down = up_OR.double(), down_RI.double()
    return math.sqrt(max(0.0, float(((up.T @ up) * (down @ down.T)).sum())))


def _files(
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    rank: int,
    base: Iterable[str],
    base_name: str,
    inputs_first: bool,
) -> dict[str, bytes]:
    """The folder. Smaller ranks are filled up with zeros, so that one rank says it all."""
    tensors: dict[str, Tensor] = {}
    for name, (up_OR, down_RI) in pairs.items():
        module = PREFIX + name.removesuffix(".weight")
        fill = rank - down_RI.shape[0]
        tensors[f"{module}.lora_A.weight"] = torch.nn.functional.pad(
            down_RI, (0, 0, 0, fill)
        ).contiguous()
        tensors[f"{module}.lora_B.weight"] = torch.nn.functional.pad(up_OR, (0, fill)).contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": inputs_first,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": _targets(pairs, base),
    }
    return {
        CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(),
        WEIGHTS: safetensors.torch.save(tensors, metadata={"format": "pt"}),
    }


def _targets(pairs: Mapping[str, Any], base: Iterable[str]) -> list[str]:
    """The last parts of the modules' names where they mean these modules alone, else all names."""
    modules = {name.removesuffix(".weight") for name in pairs}
    leaves = {module.rpartition(".")[2] for module in modules}
    meant = {
        name.removesuffix(".weight")
        for name in base
        if name.endswith(".weight") and name.removesuffix(".weight").rpartition(".")[2] in leaves
    }
    return sorted(leaves if meant == modules else modules)
