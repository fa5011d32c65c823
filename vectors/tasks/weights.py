"""From a recipe to a checkpoint folder that any engine can load."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from vectors.errors import ModelMismatch, NameTaken, ShapeMismatch
from vectors.formats.atomic import disk_errors, sync_folder
from vectors.store.checkpoint import Checkpoint, WeightFile
from vectors.store.digest import DIGEST_CACHE, base_digest
from vectors.store.manifests import Manifest
from vectors.tasks.delta import raw_bytes
from vectors.tasks.linear import combine
from vectors.tasks.recipes import Recipe

if TYPE_CHECKING:
    # The library keeps task vectors and so imports this package; here it is only a type.
    from vectors.store.library import Library

__all__ = ["RECIPE_FILE", "materialise"]

RECIPE_FILE = "workbench-recipe.json"
# Every form that weights come in; everything else beside them belongs to the model.
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}
EXTRA_FOLDERS = ("additional_chat_templates",)

Progress = Callable[[float, str], None]
Tasks = list[tuple[float, Manifest]]


def materialise(
    library: Library,
    recipe: Recipe,
    base_dir: Path,
    target: Path,
    progress: Progress | None = None,
) -> Path:
    """Write the checkpoint that `recipe` makes of the one in `base_dir` to the folder `target`.

    The files are those of the base, sharding and headers included, with other numbers in them. The
    folder appears whole or not at all; one that this recipe made before is left as it is.

    Raises:
        ModelMismatch: `base_dir` is not the recipe's base, or a task vector belongs to another.
        NameNotFound: a task vector that the library does not have.
        ShapeMismatch: a task vector with a tensor that the base does not have like that.
        NameTaken: `target` holds something else.
        OutOfSpace: no space, or a folder that cannot be written.
    """
    report = progress or (lambda share, words: None)
    if _is_made(target, recipe):
        return target
    checkpoint = Checkpoint(base_dir)
    base = base_digest(base_dir, cache=base_dir / DIGEST_CACHE)
    if base != recipe.base:
        raise ModelMismatch(
            f"The recipe is for base {recipe.base[:12]}, and {base_dir} has {base[:12]}; "
            "give the folder of the recipe's own model."
        )
    tasks = [(w, library.task_by_digest(d, recipe.base)) for d, w in recipe.terms]
    for _, task in tasks:
        _check_names(task, checkpoint, base_dir)
    with disk_errors(target), _partial(target) as folder:
        if _is_made(target, recipe):
            return target
        _copy_others(base_dir, folder)
        (folder / RECIPE_FILE).write_bytes(recipe.to_json())
        done, total = 0, len(checkpoint)
        for file in checkpoint.files:
            for name in _write(file, checkpoint, library, tasks, folder):
                done += 1
                report(done / total, f"computed {name}")
        _sync(folder)
        folder.rename(target)
        sync_folder(target.parent)
    return target


def _is_made(target: Path, recipe: Recipe) -> bool:
    if not target.exists():
        return False
    try:
        made = (target / RECIPE_FILE).read_bytes()
    except OSError:
        made = b""
    if made != recipe.to_json():
        raise NameTaken(
            f"{target} exists and was not made by this recipe; remove it, or choose another folder."
        )
    return True


def _check_names(task: Manifest, checkpoint: Checkpoint, base_dir: Path) -> None:
    for name in task.tensors:
        if name not in checkpoint:
            raise ShapeMismatch(
                f"The task vector has a tensor '{name}', which the model in {base_dir} lacks; "
                "use the model that it was made for."
            )


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target`, and nobody else making folders there.

    One at a time: the second who wants a recipe finds it made, and what a killed process left
    behind is known to be nobody's.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.parent / ".workbench-partial"
    with FileLock(target.parent / ".workbench-partial.lock"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _copy_others(base_dir: Path, folder: Path) -> None:
    """Copy configuration, tokenizer, templates, licence: what is neither weights nor hidden."""
    for path in sorted(base_dir.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_file() and path.suffix not in WEIGHTS:
            shutil.copyfile(path, folder / path.name)
        elif path.is_dir() and path.name in EXTRA_FOLDERS:
            shutil.copytree(path, folder / path.name)


def _write(
    file: WeightFile, checkpoint: Checkpoint, library: Library, tasks: Tasks, folder: Path
) -> Iterator[str]:
    """Write one file of the base with the recipe's numbers; yield each tensor's name when done."""
    with (folder / file.path.name).open("xb") as out:
        out.write(file.header)
        for slot in file.slots:
            changing = [(w, task) for w, task in tasks if slot.name in task.tensors]
            if changing:
                base = checkpoint[slot.name]
                terms = [(w, library.tuned_tensor(t, slot.name, base)) for w, t in changing]
                out.write(raw_bytes(combine(base, terms)))
            else:
                out.write(checkpoint.read(slot.name))
            yield slot.name


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)
