"""Control vectors in GGUF files, as repeng and llama.cpp keep them.

Two numberings are on people's disks, and the tensors' names do not tell them apart:

* `gguf` (repeng, EasySteer, saklas; what llama.cpp loads): `direction.k` was read at the output of
  decoder block `k`, 0-based, and is added there. Block `b` is `direction.b`. llama.cpp refuses a
  file with `direction.0`, so it is never written.
* `gguf-shifted` (llama.cpp's own cvector-generator): what was read at the output of block `b` is
  written as `direction.(b+1)`, so llama.cpp adds it one block later than it was read.

The generator writes `controlvector.layer_count` as a signed integer, and all the others as an
unsigned one; that is what tells them apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from vectors.errors import BlockNotFound, VectorFileError
from vectors.formats.foreign import Calibration, Foreign, additions, foreign
from vectors.formats.gguf import Gguf, Kind, read_gguf, write_gguf
from vectors.types import SteeringVector

__all__ = ["GGUF", "SHIFTED", "control_vector_bytes", "numbering", "read_control_vector"]

GGUF, SHIFTED = "gguf", "gguf-shifted"
ARCHITECTURES = ("controlvector", "steeringvector")  # the second is dialz's; read, never written
CARRIED = "controlvector.workbench"
NAME = re.compile(r"direction\.(0|[1-9][0-9]{0,4})")


def read_control_vector(data: bytes, source: str, shifted: bool = False) -> Foreign:
    """Read a control vector; `shifted` says that `direction.k` was read at block `k - 1`.

    Raises:
        VectorFileError: not a whole control vector, or `direction.0` in a shifted one.
    """
    file = read_gguf(data, source)
    _architecture(file, source)
    rows: dict[int, Tensor] = {}
    for name, tensor in file.tensors.items():
        match = NAME.fullmatch(name)
        if match is None:
            raise VectorFileError(
                f"{source} has a tensor {name[:60]!r}; a control vector has only "
                "'direction.<number>', so check the file."
            )
        block = int(match[1]) - shifted
        if block < 0:
            raise VectorFileError(
                f"{source} has 'direction.0', which llama.cpp's generator never writes; "
                f"import it as {GGUF}."
            )
        rows[block] = tensor
    carried = file.metadata.get(CARRIED)
    return foreign(
        SHIFTED if shifted else GGUF,
        rows,
        source,
        model=_hint(file),
        carried=Calibration.read(carried) if isinstance(carried, str) else None,
    )


def numbering(data: bytes, source: str) -> str | None:
    """Return `gguf` or `gguf-shifted`, or None where the file does not show which it is.

    Raises:
        VectorFileError: not a whole control vector.
    """
    file = read_gguf(data, source)
    kind = file.kinds.get(f"{_architecture(file, source)}.layer_count")
    return {Kind.UINT32: GGUF, Kind.INT32: SHIFTED}.get(kind) if kind is not None else None


def control_vector_bytes(
    vector: SteeringVector, blocks: list[int], model_type: str = "", shifted: bool = False
) -> bytes:
    """Return a control vector whose strength, in the programs that load it, is our dose.

    `direction.k = mean_norm_b * unit(v_b)`, with `k = b`, or `k = b + 1` for `shifted`.

    Args:
        blocks: which directions; llama.cpp adds all that the file holds.
        model_type: for `controlvector.model_hint`, such as `llama`.

    Raises:
        BlockNotFound: a block that the vector lacks, or block 0 where the file cannot have it.
    """
    if not shifted and 0 in blocks:
        raise BlockNotFound(
            "A GGUF control vector cannot hold block 0, since llama.cpp refuses 'direction.0'; "
            "export other blocks."
        )
    tensors: Mapping[str, Tensor] = {
        f"direction.{block + shifted}": v_D
        for block, v_D in additions(vector, sorted(blocks)).items()
    }
    kept = vector.mean_norms.items()
    carried = Calibration.of(vector).model_copy(
        update={
            "best_block": vector.best_block if vector.best_block in blocks else min(blocks),
            "mean_norms": {block: norm for block, norm in kept if block in blocks},
        }
    )
    values = [
        ("general.architecture", Kind.STRING, ARCHITECTURES[0]),
        ("controlvector.model_hint", Kind.STRING, model_type),
        ("controlvector.layer_count", Kind.INT32 if shifted else Kind.UINT32, len(tensors)),
        (CARRIED, Kind.STRING, carried.text()),
    ]
    return write_gguf(values, tensors)


def _architecture(file: Gguf, source: str) -> str:
    found = file.metadata.get("general.architecture")
    if found not in ARCHITECTURES:
        raise VectorFileError(
            f"{source} is a GGUF file of {str(found)[:60]!r}, not a control vector; "
            "name a file made by repeng, llama.cpp or the workbench."
        )
    return str(found)


def _hint(file: Gguf) -> str:
    for architecture in ARCHITECTURES:
        found = file.metadata.get(f"{architecture}.model_hint")
        if isinstance(found, str):
            return found[:200]
    return ""
