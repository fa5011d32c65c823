"""The models that the workbench knows: the bundled one, local folders, and Hugging Face names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vectors.errors import DownloadFailed, InputError, ModelNotSupported, NameNotFound
from vectors.paths import expanded
from vectors.store import DIGEST_CACHE, base_digest
from workbench.models.bundled import BUNDLED, bundled_model
from workbench.settings import WINDOW, Home

__all__ = ["Model", "find_model", "from_anywhere", "list_models", "remember"]

USUAL_WINDOW = 4096
NAME_MAX = 255  # bytes that a file system takes for one part of a path
WEIGHTS = "*.safetensors"
SIZES = {BUNDLED: "135M parameters, bundled, 269 MB on disk"}

Report = Callable[[float, str], None]


@dataclass(frozen=True)
class Model:
    """A checkpoint on this disk, ready to load."""

    name: str
    folder: Path
    base: str
    blocks: int
    width: int
    window: int
    vocabulary: int
    bytes: int
    architecture: str
    hybrid: bool

    @property
    def served_window(self) -> int:
        """The window that an engine is started with: a longer one costs memory that few prompts use.

        Raises:
            InputError: `WORKBENCH_WINDOW` names no number of positions.
        """
        named = os.environ.get(WINDOW, "") or str(USUAL_WINDOW)
        if not (named.isascii() and named.isdigit() and len(named) < 10 and int(named) >= 256):
            raise InputError(f"{WINDOW} must be a number from 256 on, not {named[:40]!r}.")
        return min(self.window, int(named))

    @property
    def size(self) -> str:
        """The weights' size, for people."""
        return _size(self.bytes)


def list_models(home: Home) -> list[dict[str, Any]]:
    """Every model that can be named: its name, its folder once it is on disk, and its size."""
    rows: list[dict[str, Any]] = [
        {"name": BUNDLED, "folder": "", "note": SIZES[BUNDLED], "ready": False}
    ]
    known = {BUNDLED: rows[0]}
    for folder in sorted(home.models.iterdir()):
        if folder.name.startswith(".") or not (folder / "config.json").is_file():
            continue
        row = known.get(folder.name)
        if row is None:
            row = {"name": folder.name, "note": f"{_size(_weight_bytes(folder))} on disk"}
            rows.append(row)
        row |= {"folder": str(folder), "ready": True}
    for name, folder in _remembered(home).items():
        here = (Path(folder) / "config.json").is_file()
        rows.append({"name": name, "folder": folder, "note": "local folder", "ready": here})
    return rows


def find_model(home: Home, name: str, report: Report = lambda share, words: None) -> Model:
    """Return the model called `name`, fetching the bundled one or a Hugging Face one on first use.

    Args:
        name: the bundled model's name, a name of `list_models`, a folder, or `owner/name`.

    Raises:
        NameNotFound: nothing goes by this name.
        ModelNotSupported: it cannot be steered or trained here, and why.
        DownloadFailed: it could not be fetched.
    """
    folder = _folder(home, name, report)
    return describe(name if not Path(name).is_dir() else Path(name).resolve().name, folder)


def _folder(home: Home, name: str, report: Report) -> Path:
    if name == BUNDLED:
        return bundled_model(home.models, report)
    long = any(len(os.fsencode(part)) > NAME_MAX for part in name.split("/"))
    if not name or long or len(name) > 400 or "\0" in name:
        raise NameNotFound("A model needs a name; try 'workbench models list'.")
    remembered = _remembered(home).get(name)
    if remembered and Path(remembered).is_dir():
        return Path(remembered)
    if (inside := _inside(home, name)) is not None:
        return inside
    if expanded(name).is_dir():
        return expanded(name).resolve()
    if name.count("/") == 1 and not name.startswith(("/", ".", "~")):
        return _download(home, name, report)
    raise NameNotFound(
        f"There is no model {name[:80]!r}; name one of 'workbench models list', a folder with a "
        "checkpoint, or a Hugging Face model as owner/name."
    )


def _inside(home: Home, name: str) -> Path | None:
    """The folder of that name among the home's own models."""
    if "/" in name or name in (".", ".."):
        return None
    try:
        return inside if (inside := home.models / name).is_dir() else None
    except (OSError, ValueError):
        return None


def from_anywhere(home: Home, name: str) -> str:
    """The same model by a name that does not depend on the folder in which one stands.

    Raises:
        InputError: a path of a user without a home.
    """
    if name == BUNDLED or name in _remembered(home) or _inside(home, name):
        return name
    try:
        return str(expanded(name).resolve()) if expanded(name).is_dir() else name
    except (OSError, ValueError):
        return name  # no path at all, which whoever looks for the model will say


def _download(home: Home, name: str, report: Report) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  # slow to import, rarely needed
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError  # noqa: PLC0415

    target = home.models / name.replace("/", "--")
    report(0.0, f"fetching {name}")
    try:
        wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        snapshot_download(name, local_dir=target, allow_patterns=wanted)
    except GatedRepoError as error:
        raise ModelNotSupported(
            f"{name} is gated: accept its licence on its page and run 'hf auth login', then try again."
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise DownloadFailed(
            f"{name} could not be fetched ({str(error).splitlines()[0][:160]}); check the name and the "
            "network, or give a local folder instead."
        ) from error
    return target


def describe(name: str, folder: Path) -> Model:
    """Read what is needed of the checkpoint in `folder`, refusing what cannot work.

    Raises:
        ModelNotSupported: no config, no safetensors, quantised, or not a decoder.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelNotSupported(
            f"{folder} has no readable config.json; name a folder with a Hugging Face checkpoint."
        ) from error
    architecture = (config.get("architectures") or ["unknown"])[0]
    if config.get("quantization_config"):
        raise ModelNotSupported(
            f"{name} is quantised; its weights cannot be trained, so use the unquantised checkpoint."
        )
    if config.get("is_encoder_decoder") or not architecture.endswith(
        ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
    ):
        raise ModelNotSupported(
            f"{name} is a {architecture}, not a decoder-only language model; choose one that is."
        )
    if not list(folder.glob(WEIGHTS)):
        raise ModelNotSupported(f"{name} has no safetensors weights in {folder}; convert it first.")
    text = config.get("text_config") or config
    try:
        blocks, width = int(text["num_hidden_layers"]), int(text["hidden_size"])
        vocabulary = int(text["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelNotSupported(
            f"{name}'s config does not say {error}; the workbench needs the number of layers, the "
            "hidden size and the vocabulary size."
        ) from error
    return Model(
        name=name,
        folder=folder,
        base=base_digest(folder, cache=folder / DIGEST_CACHE),
        blocks=blocks,
        width=width,
        window=int(text.get("max_position_embeddings") or 2048),
        vocabulary=vocabulary,
        bytes=_weight_bytes(folder),
        architecture=architecture,
        hybrid="linear_attention" in (text.get("layer_types") or [])
        or "linear_num_value_heads" in text,
    )


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob(WEIGHTS))


def _size(count: int) -> str:
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def remember(home: Home, name: str, folder: Path) -> Model:
    """Add a local folder to the list under `name`; the folder stays where it is."""
    model = describe(name, expanded(folder).resolve())
    rows = {**_remembered(home), name: str(model.folder)}
    file = home.models / "folders.json"
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(rows, indent=1))
    temporary.replace(file)
    return model


def _remembered(home: Home) -> dict[str, str]:
    try:
        rows = json.loads((home.models / "folders.json").read_text())
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in rows.items()} if isinstance(rows, dict) else {}
