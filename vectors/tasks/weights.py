"""From a recipe to a checkpoint folder that any engine can load."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol

from filelock import FileLock
from torch import Tensor

from vectors.errors import ModelMismatch, NameTaken, ShapeMismatch
from vectors.formats.atomic import disk_errors, sync_folder
from vectors.store.checkpoint import INDEX, Checkpoint, WeightFile
from vectors.store.digest import DIGEST_CACHE, base_digest
from vectors.store.manifests import Manifest
from vectors.tasks.delta import delta, raw_bytes
from vectors.tasks.linear import combine
from vectors.tasks.memo import LibraryMemo, Memo
from vectors.tasks.merge import apply, check_count
from vectors.tasks.methods.ties import TiesParameters
from vectors.tasks.recipes import LINEAR, Operation, Recipe
from vectors.tasks.sources import LibraryTerm, Term
from vectors.tasks.stack import stacked
from vectors.tasks.streams import write_ties

if TYPE_CHECKING:
    # The library keeps task vectors and so imports this package; here it is only a type.
    from vectors.store.library import Library

__all__ = ["RECIPE_FILE", "Writer", "changed_tensors", "materialise", "write_weights"]

RECIPE_FILE = "workbench-recipe.json"
# Every form that weights come in; everything else beside them belongs to the model.
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}
EXTRA_FOLDERS = ("additional_chat_templates",)

Progress = Callable[[float, str], None]


class Writer(Protocol):
    """A function like `write_weights`."""

    def __call__(
        self,
        checkpoint: Checkpoint,
        terms: Sequence[Term],
        weights: Sequence[float],
        op: Operation,
        folder: Path,
        memo: Memo | None = None,
    ) -> Iterator[str]:
        """Write the merged files to `folder`; yield each tensor's name."""
        ...


def materialise(
    library: Library,
    recipe: Recipe,
    base_dir: Path,
    target: Path,
    progress: Progress | None = None,
    write: Writer | None = None,
) -> Path:
    """Write the checkpoint that `recipe` makes of the one in `base_dir` to the folder `target`.

    The files are those of the base, sharding and headers included, with other numbers in them. The
    folder appears whole or not at all; one that this recipe made before is left as it is.

    Args:
        write: what stands in for `write_weights`, on another device for instance, with its bits.

    Raises:
        ModelMismatch: `base_dir` is not the recipe's base, or a task vector belongs to another.
        NameNotFound: a task vector that the library does not have.
        ShapeMismatch: a task vector with a tensor that the base does not have like that.
        InputError: too few terms for the method, or values that it cannot merge.
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
    terms = _terms(library, recipe, checkpoint, base_dir)
    weights = [weight for _, weight in recipe.terms]
    with disk_errors(target), _partial(target) as folder:
        if _is_made(target, recipe):
            return target
        _copy_others(base_dir, folder)
        (folder / RECIPE_FILE).write_bytes(recipe.to_json())
        write = write or write_weights
        written = write(checkpoint, terms, weights, recipe.op, folder, LibraryMemo(library))
        for done, name in enumerate(written, 1):
            report(done / len(checkpoint), f"computed {name}")
        _sync(folder)
        folder.rename(target)
        sync_folder(target.parent)
    return target


def changed_tensors(
    library: Library,
    recipe: Recipe,
    base_dir: Path,
    scratch: Path,
    write: Writer | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the new tensor of everything that the recipe may change in its base.

    For models that are in memory already; the bits are those of `materialise`, a tensor at a time.

    Args:
        base_dir: the recipe's own base, which is not looked at again here.
        scratch: a folder on a disk with room for the model; only TIES, which is merged out of
            core, writes there, and clears it away.
        write: what stands in for `write_weights` then.

    Raises:
        NameNotFound, ModelMismatch, ShapeMismatch, InputError: see `materialise`.
        OutOfSpace: no space for TIES.
    """
    checkpoint = Checkpoint(base_dir)
    terms = _terms(library, recipe, checkpoint, base_dir)
    weights = [weight for _, weight in recipe.terms]
    names = [name for name in checkpoint if any(term.changes(name) for term in terms)]
    if not isinstance(recipe.op.parameters, TiesParameters):
        for name in names:
            yield name, _tensor(name, checkpoint, list(zip(weights, terms, strict=True)), recipe.op)
        return
    with disk_errors(scratch), TemporaryDirectory(dir=scratch) as written:
        folder = Path(written)
        if (base_dir / INDEX).is_file():
            shutil.copyfile(base_dir / INDEX, folder / INDEX)
        write = write or write_weights
        for _ in write(checkpoint, terms, weights, recipe.op, folder, LibraryMemo(library)):
            pass
        merged = Checkpoint(folder)
        for name in names:
            yield name, merged[name]


def write_weights(
    checkpoint: Checkpoint,
    terms: Sequence[Term],
    weights: Sequence[float],
    op: Operation,
    folder: Path,
    memo: Memo | None = None,
) -> Iterator[str]:
    """Write the base's weight files with the numbers that `op` makes; yield each tensor's name.

    Args:
        terms: in the order of their keys.
        memo: where magnitudes that were counted are kept for the next time.

    Raises:
        InputError: values that the method cannot merge.
        ShapeMismatch: a term that does not fit the base, or that changes integers.
    """
    parameters = op.parameters
    if isinstance(parameters, TiesParameters) and terms:
        yield from write_ties(checkpoint, terms, weights, parameters, folder, memo)
        return
    for file in checkpoint.files:
        yield from _write(file, checkpoint, list(zip(weights, terms, strict=True)), op, folder)


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


def _terms(library: Library, recipe: Recipe, checkpoint: Checkpoint, base_dir: Path) -> list[Term]:
    """The recipe's task vectors, in its order, once it is known that they fit."""
    check_count(recipe.op.row, len(recipe.terms))
    terms: list[Term] = []
    for digest, _ in recipe.terms:
        task = library.task_by_digest(digest, recipe.base)
        _check_names(task, checkpoint, base_dir)
        terms.append(LibraryTerm(digest, library, task, checkpoint))
    return terms


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
    file: WeightFile,
    checkpoint: Checkpoint,
    terms: Sequence[tuple[float, Term]],
    op: Operation,
    folder: Path,
) -> Iterator[str]:
    """Write one file of the base with other numbers, a tensor at a time."""
    with (folder / file.path.name).open("xb") as out:
        out.write(file.header)
        for slot in file.slots:
            if not any(term.changes(slot.name) for _, term in terms):
                out.write(checkpoint.read(slot.name))
            else:
                out.write(raw_bytes(_tensor(slot.name, checkpoint, terms, op)))
            yield slot.name


def _tensor(
    name: str, checkpoint: Checkpoint, terms: Sequence[tuple[float, Term]], op: Operation
) -> Tensor:
    """A tensor that some term changes, merged by a method that needs no other tensor."""
    base = checkpoint[name]
    if op != LINEAR:
        return _merged(name, base, terms, op)
    return combine(base, [(w, t.tensor(name, base)) for w, t in terms if t.changes(name)])


def _merged(name: str, base: Tensor, terms: Sequence[tuple[float, Term]], op: Operation) -> Tensor:
    tuned = {t.key: t.tensor(name, base) if t.changes(name) else base for _, t in terms}
    if not base.dtype.is_floating_point:
        raise ShapeMismatch(
            f"'{name}' is of {base.dtype} and a term changes it; integers cannot be merged, so use "
            "that term alone, linearly, at weight 1."
        )
    deltas = {key: delta(base, tensor) for key, tensor in tuned.items()}
    stack = stacked(name, deltas, {t.key: w for w, t in terms})
    only = next(iter(tuned.values())) if len(tuned) == 1 else None
    return apply(base, only, stack, op.row.merge(stack, op.parameters))


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)
