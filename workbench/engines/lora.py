"""From task terms to a LoRA that an engine gives to single requests.

The low-rank part of what the terms change, as a PEFT folder below the home. Its name is a digest of
base, recipe, and the rank or error that was asked for, so that a second use does nothing. What a LoRA
cannot hold (norms, embeddings, and linear layers that vLLM does not give LoRAs to) counts in the error.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from vectors.errors import GrammarError, OutOfSpace
from vectors.formats.atomic import disk_errors
from vectors.formats.canonical import canonical_json, sha256
from vectors.formats.folder import new_folder
from vectors.formats.peft import CONFIG, fit_changes
from vectors.grammar import TaskTerm
from vectors.store import Library
from vectors.store.checkpoint import Checkpoint
from vectors.tasks import Recipe
from vectors.tasks.weights import changed_tensors
from workbench.engines.base import LORA, LoraReceipt
from workbench.engines.vllm.settings import HELD
from workbench.engines.weights import recipe_of
from workbench.models.catalog import Model
from workbench.settings import Home

__all__ = ["RANK", "LoraFile", "lora_folder", "lora_made", "read_lora_file"]

Report = Callable[[float, str], None]

RANK = 16
FILE = "workbench-lora.json"
FORMAT = 1
KEPT = 32


class LoraFile(BaseModel):
    """What stands beside the factors: what they are of, and what they lose.

    Args:
        recipe: digest of the recipe; `terms` are its task vectors' digests and weights.
        error: `|delta - B A| / |delta|` over all that the recipe changes, in Frobenius norms.
        errors: the same for each tensor; 1 for those that the LoRA cannot hold.
        modules: how many linear layers have factors, and `norm` is `|B A|` over them: an engine that
            has loaded all of them finds both.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    base: str
    recipe: str
    terms: tuple[tuple[str, float], ...]
    rank: int
    error: float
    errors: dict[str, float]
    left_out: tuple[str, ...]
    modules: int
    norm: float

    @property
    def receipt(self) -> LoraReceipt:
        """What every reply with this LoRA carries."""
        return LoraReceipt(self.recipe, self.rank, self.error, self.modules, len(self.left_out))


def lora_folder(loras: Path, digest: str) -> Path:
    """Where the LoRA called `digest` lies.

    Raises:
        GrammarError: not a digest, and so perhaps a path that leads elsewhere.
    """
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise GrammarError(f"A LoRA is named by 64 hex digits, not {digest[:80]!r}.")
    return loras / digest


def read_lora_file(folder: Path) -> LoraFile | None:
    """What the folder says of itself, or None where there is no whole one."""
    try:
        found = LoraFile.model_validate_json((folder / FILE).read_bytes())
    except (OSError, ValidationError):
        return None
    return found if found.format == FORMAT and (folder / CONFIG).is_file() else None


def lora_made(
    home: Home,
    library: Library,
    model: Model,
    terms: Sequence[TaskTerm],
    *,
    rank: int | None = None,
    error: float | None = None,
    report: Report = lambda share, words: None,
) -> str:
    """Make sure that the LoRA of `terms` is on the disk; return the state's name, `lora:<digest>`.

    Args:
        rank: of every module, or less where a matrix is smaller; by default 16; or
        error: the largest share of the change that may be lost; the rank follows.

    Raises:
        NameNotFound, ModelMismatch: see `workbench.engines.weights.recipe_of`.
        InputError: both rank and error, one out of bounds, or nothing that a LoRA can hold.
        OutOfSpace: there is no room.
    """
    recipe = recipe_of(library, model, terms)
    if not recipe.terms:
        return "base"
    rank = RANK if rank is None and error is None else rank
    asked = {"format": FORMAT, "recipe": recipe.digest, "rank": rank, "error": error}
    digest = sha256(canonical_json({**asked, "base": model.base, "held": list(HELD)}))
    folder = lora_folder(home.loras, digest)
    home.loras.mkdir(parents=True, exist_ok=True)
    with FileLock(home.loras / ".lock"):
        if read_lora_file(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
            _make_room(home.loras, model)
            _make(home, library, model, recipe, folder, rank, error, report)
        os.utime(folder)
    return LORA + digest


def _make(
    home: Home,
    library: Library,
    model: Model,
    recipe: Recipe,
    folder: Path,
    rank: int | None,
    error: float | None,
    report: Report,
) -> None:
    checkpoint = Checkpoint(model.folder)

    def changes() -> Iterator[tuple[str, Tensor, Tensor]]:
        new = changed_tensors(library, recipe, model.folder, home.loras)
        for done, (name, tensor) in enumerate(new):
            report(done / len(checkpoint), f"low-rank part of {name}")
            yield name, checkpoint[name], tensor

    fit = fit_changes(
        changes(), checkpoint, rank=rank, error=error, base_name=model.name, holds=_held
    )
    stated = LoraFile(
        format=FORMAT,
        base=model.base,
        recipe=recipe.digest,
        terms=recipe.terms,
        rank=fit.rank,
        error=fit.error,
        errors=dict(fit.errors),
        left_out=fit.left_out,
        modules=sum(norm > 0 for norm in fit.norms.values()),
        norm=math.sqrt(sum(norm**2 for norm in fit.norms.values())),
    )
    with disk_errors(folder), new_folder(folder) as half:
        for name, data in fit.files.items():
            (half / name).write_bytes(data)
        (half / FILE).write_bytes(canonical_json(stated.model_dump(mode="json")))


def _held(name: str) -> bool:
    """Whether vLLM gives this linear layer a LoRA; experts are fused, and have none here."""
    return ".experts." not in name and name.removesuffix(".weight").rpartition(".")[2] in HELD


def _make_room(loras: Path, model: Model) -> None:
    """Drop the longest unused ones, which can be made again, until one more fits."""
    need = model.bytes + (64 << 20)
    made = [f for f in loras.iterdir() if f.is_dir() and not f.name.startswith(".")]
    made.sort(key=lambda folder: folder.stat().st_mtime)
    while made and (len(made) >= KEPT or shutil.disk_usage(loras).free < need):
        shutil.rmtree(made.pop(0), ignore_errors=True)
    if shutil.disk_usage(loras).free < need:
        raise OutOfSpace(
            f"A LoRA needs up to {need >> 20} MB in {loras}, and "
            f"{shutil.disk_usage(loras).free >> 20} MB are free; free some space."
        )
