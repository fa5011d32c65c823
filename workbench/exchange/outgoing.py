"""Out: an entry as a file or folder that another program reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vectors.errors import InputError, ModelMismatch
from vectors.formats.atomic import disk_errors, write_atomic
from vectors.formats.canonical import canonical_json
from vectors.formats.control_vector import GGUF, SHIFTED, control_vector_bytes
from vectors.formats.folder import EXPORT_FILE, check_target, new_folder
from vectors.formats.kinds import AUTO, Format, choose
from vectors.formats.native import vector_bytes
from vectors.formats.peft import CONFIG, WEIGHTS, fit_lora
from vectors.formats.persona import persona_bytes
from vectors.formats.svec import svec_bytes
from vectors.store import Entry
from vectors.store.checkpoint import Checkpoint
from vectors.tasks import Recipe, materialise
from vectors.types import SteeringVector
from workbench.merging.choose import Merging
from workbench.models.catalog import Model

if TYPE_CHECKING:
    from workbench.service import Workbench

__all__ = ["export_entry"]

Report = Callable[[float, str], None]
KINDS = ("steering-vector", "task-vector", "recipe")
# Their linear layers keep weights inputs first, as PEFT's `fan_in_fan_out` says.
INPUTS_FIRST = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
RANK = 16


def export_entry(
    wb: Workbench,
    ref: str,
    path: Path,
    *,
    format: str = AUTO,
    force: bool = False,
    blocks: str = "",
    rank: int | None = None,
    error: float | None = None,
    seed: int = 0,
    report: Report = lambda share, words: None,
) -> dict[str, Any]:
    """Write the entry `ref` to `path`, whole or not at all; return what was written.

    Args:
        blocks: of a steering vector: `best`, `all`, `15` or `10-20`; by default the best for
            control vectors, whose programs add all that a file holds, and all for the others.
        rank, error: of a LoRA; see `vectors.formats.peft.fit_lora`.

    Raises:
        InputError: a format that does not fit, or options that do not.
        NameTaken: `path` exists and `force` was not given.
        ModelMismatch: a task vector or control vector of another base than the model in use.
    """
    entry = wb.library.get(ref, KINDS)
    row = choose(format, path, entry.kind)  # type: ignore[arg-type]
    check_target(path, force, folder=not row.suffix)
    if row.name != "lora" and (rank is not None or error is not None):
        raise InputError("A rank and an error are for --format lora; leave them out.")
    if entry.kind != "steering-vector" and blocks:
        raise InputError(f"'{ref}' is a {entry.kind}, which goes out with all its blocks.")
    told: dict[str, Any] = {"out": str(path), "format": row.name, "digest": entry.digest}
    if entry.kind == "steering-vector":
        vector = wb.library.load_vector(ref)[1]
        chosen = _blocks(vector, blocks or ("best" if row.name in (GGUF, SHIFTED) else "all"))
        data = _vector(wb, row, entry, vector, chosen)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        check_target(path, force, folder=False)
        write_atomic(path, data)
        return {**told, "blocks": chosen, "bytes": len(data)}
    model = wb.model()
    if entry.base != model.base:
        raise ModelMismatch(
            f"'{ref}' belongs to base {(entry.base or 'none')[:12]}, and {model.name} has "
            f"{model.base[:12]}; give its own model with --model."
        )
    if row.name == "lora":
        return {**told, **_lora(wb, entry, path, model, force, rank, error, seed)}
    return {**told, **_checkpoint(wb, entry, path, model, force, report)}


def _vector(
    wb: Workbench, row: Format, entry: Entry, vector: SteeringVector, blocks: list[int]
) -> bytes:
    every = blocks == sorted(vector.directions)
    if row.name in ("native", "persona"):
        if not every:
            raise InputError(f"The format {row.name} holds all blocks; leave --blocks out.")
        return vector_bytes(vector) if row.name == "native" else persona_bytes(vector)
    model = wb.model()
    if entry.base != model.base:
        raise ModelMismatch(
            f"'{entry.name}' belongs to base {(entry.base or 'none')[:12]}, and {model.name} has "
            f"{model.base[:12]}; give its own model with --model, whose type the file names."
        )
    if row.name == "svec":
        return svec_bytes(vector, blocks, _model_type(model))
    return control_vector_bytes(
        vector, blocks, _model_type(model), shifted=row.name == SHIFTED
    )  # fmt: skip


def _blocks(vector: SteeringVector, text: str) -> list[int]:
    known = sorted(vector.directions)
    if text == "best":
        return [vector.best_block]
    if text == "all":
        return known
    match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", text)
    if match is None:
        raise InputError(
            f"Blocks are best, all, one as 15, or a range as 10-20, not {text[:40]!r}."
        )
    first, last = int(match[1]), int(match[2] or match[1])
    chosen = [block for block in known if first <= block <= last]
    if not chosen:
        raise InputError(f"The vector has no direction in blocks {text}; it has {known}.")
    return chosen


def _model_type(model: Model) -> str:
    config = json.loads((model.folder / "config.json").read_bytes())
    return str(config.get("model_type", ""))


def _checkpoint(
    wb: Workbench, entry: Entry, path: Path, model: Model, force: bool, report: Report
) -> dict[str, Any]:
    recipe, merging = _recipe(wb, entry), Merging()
    with new_folder(path, force) as half:
        target = half / ".made"
        made = materialise(wb.library, recipe, model.folder, target, report, merging.write_weights)
        for part in list(made.iterdir()):
            part.rename(half / part.name)
        made.rmdir()
        for rest in half.glob(".workbench-partial*"):
            rest.unlink()
        size = sum(file.stat().st_size for file in half.rglob("*") if file.is_file())
    on = merging.made.device if merging.made else ""
    return {"bytes": size, "recipe": recipe.digest, "base": model.base, "merged_on": on}


def _lora(
    wb: Workbench,
    entry: Entry,
    path: Path,
    model: Model,
    force: bool,
    rank: int | None,
    error: float | None,
    seed: int,
) -> dict[str, Any]:
    """The adapter that the entry came as, if it did and nothing else is asked for; else a fit."""
    if {CONFIG, WEIGHTS} <= set(entry.manifest.files) and rank is None and error is None:
        files = {name: wb.library.read_file(entry, name) for name in (CONFIG, WEIGHTS)}
        told: dict[str, Any] = {"error": 0.0, "as_imported": True, "left_out": []}
    else:
        weights = wb.weights(_term(entry))
        base = Checkpoint(model.folder)
        tuned = base if weights == "base" else Checkpoint(wb.home.weights / weights)
        names = [name for name in base if base.read(name) != tuned.read(name)]
        fit = fit_lora(
            base,
            tuned,
            names,
            rank=RANK if rank is None and error is None else rank,
            error=error,
            seed=seed,
            base_name=model.name,
            inputs_first=_model_type(model) in INPUTS_FIRST,
        )
        files = dict(fit.files)
        told = {
            "rank": fit.rank,
            "error": fit.error,
            "as_imported": False,
            "left_out": list(fit.left_out),
            "errors": dict(fit.errors),
        }
    mark = {"entry": entry.digest, "base": model.base, **told}
    with new_folder(path, force) as half:
        for name, data in {**files, EXPORT_FILE: canonical_json(mark)}.items():
            (half / name).write_bytes(data)
    return {**told, "bytes": sum(map(len, files.values()))}


def _recipe(wb: Workbench, entry: Entry) -> Recipe:
    if entry.kind == "recipe":
        return wb.library.load_recipe(entry.digest)[1]
    return Recipe(base=entry.base or "", terms=((entry.digest, 1.0),))


def _term(entry: Entry) -> str:
    return f"{entry.name}@{entry.revision}=1" if entry.revision else f"{entry.digest}=1"
