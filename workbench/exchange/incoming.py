"""In: a file or folder of another program as an entry of the library."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from vectors.errors import BlockNotFound, InputError, ModelMismatch, ShapeMismatch
from vectors.formats.canonical import sha256
from vectors.formats.foreign import Calibration, Foreign, calibrated, read_bytes
from vectors.formats.kinds import AUTO, FORMATS, detect, read_foreign
from vectors.formats.mergekit import BIGGEST as BIGGEST_RECIPE
from vectors.formats.mergekit import read_mergekit
from vectors.formats.native import read_vector
from vectors.formats.peft import CONFIG, WEIGHTS, read_lora
from vectors.formats.tuned import check_same_model, is_tied, tuned_tensors
from vectors.grammar import check_name
from vectors.paths import expanded
from vectors.store import Entry
from vectors.store.checkpoint import Checkpoint
from vectors.tasks import Recipe
from workbench.models.catalog import Model

if TYPE_CHECKING:
    from workbench.service import Workbench

__all__ = ["FILE_UNIT", "import_entry"]

Report = Callable[[float, str], None]
FILE_UNIT = "file"
NO_TERMS: Mapping[str, str] = {}


def import_entry(
    wb: Workbench,
    path: Path,
    name: str,
    *,
    format: str = AUTO,
    contrast: str = "",
    like: str = "",
    unit: str = "",
    block: int | None = None,
    terms: Mapping[str, str] = NO_TERMS,
    ignore_hint: bool = False,
    report: Report = lambda share, words: None,
) -> dict[str, Any]:
    """Keep what lies at `path` as `name`; return the entry's name, revision, digest and notes.

    A steering vector of another program has no dose. Exactly one of these gives it one:

    Args:
        contrast: a contrast set; the residual stream's norms are measured on the model in use, and
            so is the best block.
        like: a vector of the library, of the same base, whose norms are taken.
        unit: `file`: dose 1 adds what the file holds.
        block: the best block, where it is not measured.
        terms: for a recipe, from a model's name in the file to a task vector of the library.
        ignore_hint: take the model in use for the base, whatever name the file gives it.

    Raises:
        InputError: a file that is not valid, or options that do not fit it.
        ModelMismatch: made for another model than the one in use.
    """
    check_name(name)
    format = detect(path) if format == AUTO else format
    row = FORMATS.get(format)
    if row is None or not row.reads:
        known = ", ".join(name for name, row in FORMATS.items() if row.reads)
        raise InputError(f"There is no format {format[:40]!r} to import; use one of {known}.")
    notes: tuple[str, ...] = ()
    if row.holds != "steering-vector" and (contrast or like or unit or block is not None):
        raise InputError(f"A dose is for steering vectors, and {path} is a {row.holds}.")
    if row.name == "native":
        entry = wb.library.save_vector(name, read_vector(path))
    elif row.holds == "steering-vector":
        found = read_foreign(path, format)
        given = [bool(contrast), bool(like), bool(unit)]
        entry, notes = _vector(wb, path, name, found, contrast, like, unit, block, ignore_hint,
                               given, report)  # fmt: skip
    elif row.name == "mergekit":
        entry, notes = _mergekit(wb, path, name, terms, ignore_hint)
    elif row.name == "lora":
        entry = _lora(wb, path, name, report)
    else:
        entry = _checkpoint(wb, path, name, report)
    return {
        "name": entry.name,
        "kind": entry.kind,
        "revision": entry.revision,
        "digest": entry.digest,
        "format": row.name,
        "notes": list(notes),
    }


# -- steering vectors ---------------------------------------------------------------------------


def _vector(
    wb: Workbench,
    path: Path,
    name: str,
    found: Foreign,
    contrast: str,
    like: str,
    unit: str,
    block: int | None,
    ignore_hint: bool,
    given: list[bool],
    report: Report,
) -> tuple[Entry, tuple[str, ...]]:
    if unit not in ("", FILE_UNIT):
        raise InputError(f"The unit of a dose is '{FILE_UNIT}', not {unit[:40]!r}.")
    if sum(given) > 1 or not (sum(given) or found.carried):
        raise InputError(
            f"{path} does not say how strong its directions are, so choose one: --contrast SET "
            "measures the doses on the model, --like VECTOR takes those of a vector of the same "
            f"model, --unit {FILE_UNIT} lets dose 1 add what the file holds."
        )
    source = {"sha256": sha256(read_bytes(path))}
    if not sum(given) and found.carried is not None:
        if block is not None:
            raise InputError(f"{path} carries its own calibration; leave --block out.")
        vector = calibrated(found, found.carried, str(path), {"dose_unit": "carried", **source})
        return wb.library.save_vector(name, vector), found.notes
    model = wb.model()
    found = _checked(found, model, path, ignore_hint)
    files: dict[str, bytes] = {}
    if contrast:
        from workbench.exchange.calibrate import measure  # noqa: PLC0415  # loads the model
        from workbench.models.loading import load_model  # noqa: PLC0415  # as above

        chosen = wb.contrast.get(contrast)
        report(0.0, "loading the model")
        measured = measure(load_model(model), chosen, found.directions, report)
        calibration, words = measured.calibration, "measured"
        files["contrast.jsonl"] = measured.contrast.to_jsonl().encode()
        files["diagnostics.json"] = json.dumps(measured.blocks).encode()
    elif like:
        other = wb.library.load_vector(like)[1]
        if other.base != model.base:
            raise ModelMismatch(
                f"'{like}' belongs to base {other.base[:12]}, and {model.name} has "
                f"{model.base[:12]}; take a vector of the model in use."
            )
        best = other.best_block if block is None else block
        norms = dict(other.mean_norms)
        calibration, words = _calibration(model, best, norms), f"as in {like}"
    else:
        best = _only(found, path) if block is None else block
        calibration, words = _calibration(model, best, found.magnitudes), "file"
    if block is not None and contrast:
        calibration = calibration.model_copy(update={"best_block": block})
    vector = calibrated(found, calibration, str(path), {"dose_unit": words, **source})
    return wb.library.save_vector(name, vector, files=files), found.notes


def _calibration(model: Model, best: int, norms: dict[int, float]) -> Calibration:
    try:
        return Calibration(
            base=model.base, best_block=best, mean_norms=norms, info={"model": model.name}
        )
    except ValidationError as error:
        raise BlockNotFound(f"There is no block {best}; name one of the file's.") from error


def _only(found: Foreign, path: Path) -> int:
    if len(found.directions) != 1:
        raise BlockNotFound(
            f"{path} has directions at blocks {sorted(found.directions)}; say with --block which "
            "one is used when a term names none."
        )
    return next(iter(found.directions))


def _checked(found: Foreign, model: Model, path: Path, ignore_hint: bool) -> Foreign:
    """Hold the directions against the model."""
    if found.carried is not None and found.carried.base != model.base:
        raise ModelMismatch(
            f"{path} was made for base {found.carried.base[:12]}, and {model.name} has "
            f"{model.base[:12]}; give its own model with --model."
        )
    if found.width != model.width:
        raise ShapeMismatch(
            f"{path} has directions of width {found.width}, and {model.name} has "
            f"{model.width}; give the model that it was made for with --model."
        )
    if found.layers is not None and found.layers != model.blocks:
        raise ShapeMismatch(
            f"{path} has rows for {found.layers} blocks and one for the embedding, and {model.name} "
            f"has {model.blocks} blocks; give the model that it was made for with --model."
        )
    if max(found.directions) >= model.blocks:
        raise BlockNotFound(
            f"{path} has a direction at block {max(found.directions)}, and {model.name} has blocks "
            f"0 to {model.blocks - 1}; check the model, and the numbering (--format)."
        )
    config = json.loads((model.folder / "config.json").read_bytes())
    names = {_plain(str(config.get("model_type", ""))), _plain(model.architecture)}
    hint = _plain(found.model)
    if hint and not ignore_hint and not any(hint == n or n.startswith(hint + "for") for n in names):
        raise ModelMismatch(
            f"{path} says that it is for a model of type {found.model[:60]!r}, and {model.name} is "
            f"{config.get('model_type')!r}; give its own model with --model, or --ignore-hint."
        )
    last = model.blocks - 1
    if found.carried is None and last in found.directions and found.format != "gguf-shifted":
        note = (
            f"The direction of the last block, {last}, was read after the final norm where the "
            "file's program goes by hidden_states."
        )
        return Foreign(found.format, found.directions, found.model, found.layers, None,
                       (*found.notes, note))  # fmt: skip
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


# -- task vectors and recipes -------------------------------------------------------------------


def _checkpoint(wb: Workbench, path: Path, name: str, report: Report) -> Entry:
    model = wb.model()
    check_same_model(model.folder, path)
    base = Checkpoint(model.folder)
    tensors = tuned_tensors(base, Checkpoint(path), str(path))
    info = {"imported": {"format": "checkpoint", "folder": path.resolve().name}}
    return _task(wb, name, model, base, tensors, info, {}, path, report)


def _lora(wb: Workbench, path: Path, name: str, report: Report) -> Entry:
    model = wb.model()
    base = Checkpoint(model.folder)
    tied = "lm_head.weight" not in base and is_tied(model.folder)
    adapter = read_lora(path, base, tied)
    # The adapter itself is kept beside the change that it makes, so that it goes out as it came.
    files = {file: (path / file).read_bytes() for file in (CONFIG, WEIGHTS)}
    info = {"imported": {"format": "lora", "sha256": sha256(files[WEIGHTS])}}
    return _task(wb, name, model, base, adapter, info, files, path, report)


def _task(
    wb: Workbench,
    name: str,
    model: Model,
    base: Checkpoint,
    tensors: Mapping[str, Any],
    info: dict[str, Any],
    files: dict[str, bytes],
    path: Path,
    report: Report,
) -> Entry:
    if all(base.read(n) == _raw(tensors[n]) for n in tensors):
        raise InputError(f"{path} is {model.name} itself, so there is no change to keep.")
    return wb.library.save_task(
        name, model.base, base, tensors, info=info, files=files, progress=report
    )


def _raw(tensor: Any) -> bytes:
    from vectors.tasks.delta import raw_bytes  # noqa: PLC0415  # only this needs it

    return raw_bytes(tensor)


def _mergekit(
    wb: Workbench, path: Path, name: str, terms: Mapping[str, str], ignore_hint: bool
) -> tuple[Entry, tuple[str, ...]]:
    data = read_bytes(path, BIGGEST_RECIPE)
    found = read_mergekit(data, str(path))
    model = wb.model()
    if found.base and not ignore_hint and not _names(found.base, model, wb.model_name):
        raise ModelMismatch(
            f"{path} is for the base {found.base[:80]!r}, and the model in use is {model.name}; "
            "give that base with --model, or --ignore-hint if they are the same."
        )
    unknown = sorted(set(terms) - {term.model for term in found.terms})
    if unknown:
        raise InputError(f"{path} has no model {unknown[0][:80]!r}; see its models.")
    weights: dict[str, float] = {}
    for term in found.terms:
        ref = terms.get(term.model, term.model)
        try:
            digest = wb.library.get(ref, "task-vector").digest
        except InputError as error:
            raise InputError(
                f"{path} merges {term.model[:80]!r}, which is no task vector of the library; import "
                f"that checkpoint, then say --term '{term.model[:80]}=NAME' with its name."
            ) from error
        weights[digest] = weights.get(digest, 0.0) + term.weight
    op: Any = "linear"
    if found.method != "linear":
        op = {"method": found.method, "options": found.options}
    try:
        recipe = Recipe.model_validate(
            {"op": op, "base": model.base, "terms": tuple(weights.items())}
        )
    except ValidationError as error:
        raise InputError(
            f"{path} merges by {found.method}, which recipes cannot do here "
            f"({error.errors()[0]['msg']}); use a method of 'workbench library merge --help'."
        ) from error
    info = {"imported": {"format": "mergekit", "notes": list(found.notes)}}
    entry = wb.library.save_recipe(name, recipe, info=info, files={"mergekit.yml": data})
    return entry, found.notes


def _names(base: str, model: Model, called: str) -> bool:
    folder = expanded(base)
    if folder.is_dir():
        return folder.resolve() == model.folder.resolve()
    return base in (model.name, called)
