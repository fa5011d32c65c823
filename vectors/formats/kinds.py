"""The formats that entries go out as and come in from, and how a file shows which one it is.

Command line and page make their choices from these rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from vectors.errors import InputError, VectorFileError
from vectors.formats.control_vector import GGUF, SHIFTED, numbering, read_control_vector
from vectors.formats.foreign import Foreign, read_bytes
from vectors.formats.gguf import MAGIC
from vectors.formats.persona import (
    PERSONA,
    PERSONA_PT,
    is_persona,
    read_persona,
    read_persona_pt,
)
from vectors.formats.svec import SVEC, read_svec

__all__ = ["AUTO", "FORMATS", "Format", "choose", "detect", "read_foreign"]

AUTO = "auto"
LORA_CONFIG = "adapter_config.json"
CHECKPOINT_FILES = ("model.safetensors", "model.safetensors.index.json")
Holds = Literal["steering-vector", "task-vector", "recipe"]


@dataclass(frozen=True)
class Format:
    """One format.

    Args:
        name: what `--format` calls it.
        label: what it is, for a list.
        holds: the kind of entry; a recipe goes out wherever a task vector does.
        suffix: of its file; empty for a folder.
        reads, writes: whether it comes in, and goes out.
        sure: it loses nothing, so that a suffix is enough to ask for it.
    """

    name: str
    label: str
    holds: Holds
    suffix: str
    reads: bool = True
    writes: bool = True
    sure: bool = True


FORMATS: Mapping[str, Format] = {
    row.name: row
    for row in (
        Format("native", "steering vector of the workbench", "steering-vector", ".safetensors"),
        Format(GGUF, "control vector of repeng and llama.cpp", "steering-vector", ".gguf"),
        Format(
            SHIFTED, "control vector of llama.cpp's own generator", "steering-vector", ".gguf"
        ),
        Format(SVEC, "CAST and AISteer360", "steering-vector", ".svec"),
        Format(PERSONA, "persona vectors as safetensors", "steering-vector", ".safetensors"),
        Format(PERSONA_PT, "persona vectors as .pt", "steering-vector", ".pt", writes=False),
        Format("checkpoint", "Hugging Face checkpoint folder", "task-vector", ""),
        Format("lora", "PEFT LoRA folder", "task-vector", "", sure=False),
        Format("mergekit", "mergekit recipe", "recipe", ".yml", writes=False),
    )
}  # fmt: skip


def detect(path: Path) -> str:
    """Return the format of what lies at `path`, never a guess.

    Raises:
        VectorFileError: nothing there, or nothing that shows what it is.
    """
    if path.is_dir():
        return _folder(path)
    data = read_bytes(path)
    if data.startswith(MAGIC):
        found = numbering(data, str(path))
        if found is None:
            raise VectorFileError(
                f"{path} does not show whether its layers are numbered as repeng does or as "
                f"llama.cpp's generator does; give --format {GGUF} or --format {SHIFTED}."
            )
        return found
    # A safetensors file begins with the length of its header, then the header.
    if data[8:9] == b"{":
        return _tensors(path)
    if path.suffix == ".svec" and data.lstrip()[:1] == b"{":
        return SVEC
    if path.suffix in (".yml", ".yaml"):
        return "mergekit"
    if data.startswith((b"PK\x03\x04", b"\x80")):
        raise VectorFileError(
            f"{path} is a pickle, which can run code when it is read; load it where you trust it "
            "and save its tensor with safetensors.torch.save_file, or, if it is a persona vector, "
            f"give --format {PERSONA_PT}."
        )
    raise VectorFileError(
        f"{path} has a format that is not known; give --format with one of "
        f"{', '.join(name for name, row in FORMATS.items() if row.reads)}."
    )


def choose(format: str, path: Path, holds: Holds) -> Format:
    """Return the format to write a `holds` to `path` in; `auto` goes by the path's suffix.

    Raises:
        InputError: no such format, one for another kind, or a suffix that shows none.
    """
    kind = "task-vector" if holds == "recipe" else holds
    fitting = [r for r in FORMATS.values() if r.writes and r.holds == kind]
    names = ", ".join(row.name for row in fitting)
    if format == AUTO:
        found = next((r for r in fitting if r.sure and r.suffix == path.suffix.lower()), None)
        if found is None:
            raise InputError(
                f"'{path.name}' does not show the format to write a {holds} in; "
                f"give --format with one of {names}."
            )
        return found
    found = FORMATS.get(format)
    if found not in fitting:
        raise InputError(
            f"A {holds} cannot be written as {format[:40]!r}; use one of {names}, or {AUTO}."
        )
    return found


def read_foreign(path: Path, format: str) -> Foreign:
    """Read the steering vector of another program at `path`.

    Raises:
        VectorFileError: not a whole and valid file of that format.
        InputError: a format that is not one of these.
    """
    data, source = read_bytes(path), str(path)
    match format:
        case "gguf" | "gguf-shifted":
            return read_control_vector(data, source, shifted=format == SHIFTED)
        case "svec":
            return read_svec(data, source)
        case "persona":
            return read_persona(data, source, _metadata(path))
        case "persona-pt":
            return read_persona_pt(data, source)
    raise InputError(f"There is no steering-vector format {format[:40]!r} of another program.")


def _folder(path: Path) -> str:
    adapter = (path / LORA_CONFIG).is_file()
    weights = any((path / name).is_file() for name in CHECKPOINT_FILES)
    if adapter and weights:
        raise VectorFileError(
            f"{path} holds both an adapter and a whole model; give --format lora or "
            "--format checkpoint."
        )
    if adapter:
        return "lora"
    if weights:
        return "checkpoint"
    raise VectorFileError(
        f"{path} is a folder with neither {LORA_CONFIG} nor {CHECKPOINT_FILES[0]}; name a "
        "checkpoint, an adapter or a file."
    )


def _tensors(path: Path) -> str:
    metadata = _metadata(path)
    if "workbench" in metadata:
        return "native"
    if is_persona(metadata):
        return PERSONA
    raise VectorFileError(
        f"{path} is a safetensors file that does not say what it holds; if it is one tensor "
        f"[n_layers + 1, D] of persona vectors, give --format {PERSONA}."
    )


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise VectorFileError(
            f"{path} is not a whole safetensors file ({error}); fetch or export it again."
        ) from error
