"""The state of a training run on disk: one safetensors file, replaced at once.

    weights.<name>            every trained parameter
    best.<name>               the same at the best measurement, where that was at another step
    optimizer.<i>.<key>       tensors of the optimizer's state
    metadata["workbench"]     JSON: format, step, identity of the run, notes, numbers of the state

There is no state of a random generator in it: the order of decisions, the projections and the
rounding are functions of the seed and the step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vectors.errors import InputError, OutOfSpace
from vectors.formats.atomic import sync_folder

__all__ = ["load_checkpoint", "save_checkpoint"]

FORMAT = 1


def save_checkpoint(
    path: Path,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    step: int,
    identity: str,
    notes: Mapping[str, Any],
    best: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the state after `step`; a reader finds the old file or the new one, never a half.

    Args:
        path: the file; its folder exists.
        weights: trained parameters by name.
        optimizer: over these parameters in this order.
        step: steps that have been taken.
        identity: what must be equal for a run to go on from here.
        notes: JSON values to get back.
        best: other weights to get back.

    Raises:
        OutOfSpace: the file cannot be written.
    """
    state = optimizer.state_dict()
    tensors = {f"weights.{name}": tensor for name, tensor in weights.items()}
    tensors.update({f"best.{name}": tensor for name, tensor in (best or {}).items()})
    numbers: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        numbers[str(index)] = {}
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                numbers[str(index)][key] = value
    about = {
        "format": FORMAT,
        "step": step,
        "identity": identity,
        "notes": dict(notes),
        "state": numbers,
        "groups": state["param_groups"],
    }
    # A folder of its own, because safetensors writes beside its target under a name that it chooses.
    for half in path.parent.glob(f".{path.name}.*"):
        # A process that was killed while it wrote.
        shutil.rmtree(half, ignore_errors=True)
    folder = path.with_name(f".{path.name}.{os.getpid()}")
    temporary = folder / path.name
    try:
        folder.mkdir()
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
            temporary,
            metadata={"workbench": json.dumps(about)},
        )
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise OutOfSpace(f"The checkpoint {path} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def load_checkpoint(
    path: Path, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, identity: str
) -> tuple[int, dict[str, Any], dict[str, Tensor]]:
    """Put weights and optimizer as they were and return the step, the notes and the best weights.

    Raises:
        InputError: not a checkpoint, or one of another run.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("workbench", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no iterator
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(
            f"The checkpoint {path} cannot be read ({error}); delete it to start over."
        ) from error
    shapes = {f"weights.{name}": tensor.shape for name, tensor in weights.items()}
    found = {name: t.shape for name, t in tensors.items() if name.startswith("weights.")}
    if about.get("format") != FORMAT or about["identity"] != identity or found != shapes:
        raise InputError(
            f"The checkpoint {path} belongs to a run with another model, other decisions or other "
            "settings; delete it to start over."
        )
    state: dict[int, dict[str, Any]] = {int(i): dict(n) for i, n in about["state"].items()}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state[int(index)][key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": about["groups"]})
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[f"weights.{name}"])
    best = {n.removeprefix("best."): t for n, t in tensors.items() if n.startswith("best.")}
    return about["step"], about["notes"], best
