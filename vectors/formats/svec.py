"""`.svec`: the JSON file of IBM's activation-steering (CAST) and AISteer360.

`directions` maps a layer `k` to its direction, which was read at the output of decoder block `k`
(`hidden_states[k + 1]`), so block `b` is layer `b`. CAST adds it to the block's *input*, which is
the output of block `b - 1`; we add at the output of `b`, where it was read.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from vectors.errors import VectorFileError
from vectors.formats.foreign import Foreign, additions, foreign
from vectors.types import SteeringVector

__all__ = ["SVEC", "read_svec", "svec_bytes"]

SVEC = "svec"
LAYER = re.compile(r"0|[1-9][0-9]{0,4}")

Row = list[FiniteFloat]


class _File(BaseModel):
    """What is read; explained variances, heads and probes say nothing about directions."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model_type: str
    directions: dict[str, Row | list[Row]]


def read_svec(data: bytes, source: str) -> Foreign:
    """Read a `.svec` file.

    Raises:
        VectorFileError: not valid, a layer that is no number, or several directions for a layer.
    """
    try:
        raw = json.loads(data, object_pairs_hook=_unique, parse_constant=_refuse)
        file = _File.model_validate(raw)
    except ValidationError as error:
        row = error.errors(include_url=False)[0]
        raise VectorFileError(
            f"{source} is not a valid .svec file ({'.'.join(map(str, row['loc'][:2]))[:80]}: "
            f"{row['msg']}); export it again."
        ) from error
    except (ValueError, RecursionError, OverflowError) as error:
        raise VectorFileError(
            f"{source} is not a valid .svec file ({str(error)[:120]}); export it again."
        ) from error
    return foreign(
        SVEC,
        {_layer(k, source): torch.tensor(_one(v, k, source)) for k, v in file.directions.items()},
        source,
        model=file.model_type[:200],
        notes=(
            "CAST adds a direction at the input of its block; here it is added at the output, "
            "where it was read.",
        ),
    )


def svec_bytes(vector: SteeringVector, blocks: list[int], model_type: str = "") -> bytes:
    """Return a `.svec` file; strength 1 of the program that loads it is our dose 1.

    Numbers are the shortest that read back as the same fp32.

    Raises:
        BlockNotFound: a block that the vector lacks.
    """
    directions = {
        str(block): [float(str(x)) for x in v_D.numpy()]
        for block, v_D in additions(vector, sorted(blocks)).items()
    }
    file = {"model_type": model_type, "directions": directions, "explained_variances": {}}
    return json.dumps(file, allow_nan=False).encode()


def _layer(text: str, source: str) -> int:
    if not LAYER.fullmatch(text):
        raise VectorFileError(
            f"{source} has a direction for layer {text[:40]!r}; layers are numbers from 0."
        )
    return int(text)


def _one(row: Any, layer: str, source: str) -> list[float]:
    if row and isinstance(row[0], list):
        if len(row) != 1:
            raise VectorFileError(
                f"{source} has {len(row)} directions for layer {layer[:40]}, a plane; "
                "only one direction a layer can be steered with, so export a single one."
            )
        row = row[0]
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _refuse(text: str) -> Any:
    raise ValueError(f"it holds {text}, which is not a number")
