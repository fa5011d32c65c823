"""Directions as other programs keep them, in our numbering of blocks, and how they get a dose.

Other files say how long a vector is, not how strong it is: they know nothing of the norm of the
residual stream that it is added to. That norm, the calibration, has to come from elsewhere.

Shape letters: D width of the residual stream.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, ValidationError
from torch import Tensor

from vectors.errors import BlockNotFound, InputError, VectorFileError
from vectors.formats.canonical import canonical_json
from vectors.types import SteeringVector

__all__ = ["BIGGEST", "Calibration", "Foreign", "additions", "calibrated", "foreign", "read_bytes"]

BIGGEST = 256 << 20
LAST_BLOCK = 99_999
SAME = 1e-3  # how far a magnitude may be from its calibration, as for unit directions

Block = Annotated[int, Field(ge=0, le=LAST_BLOCK)]


class Calibration(BaseModel):
    """What a file of raw directions lacks: the base, the norms, the block to use by default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    best_block: Block
    mean_norms: dict[Block, Annotated[FiniteFloat, Field(gt=0)]]
    info: dict[str, JsonValue] = {}

    @classmethod
    def of(cls, vector: SteeringVector) -> Calibration:
        """The calibration of a vector, for files that carry it along.

        Raises:
            VectorFileError: a base that is no digest, or information that JSON cannot carry.
        """
        try:
            return cls(
                base=vector.base,
                best_block=vector.best_block,
                mean_norms=dict(vector.mean_norms),
                info=json.loads(canonical_json(dict(vector.info), "The vector's information")),
            )
        except (ValidationError, InputError) as error:
            raise VectorFileError(
                f"The vector's calibration cannot be written ({str(error).splitlines()[0]}); "
                "extract it again."
            ) from error

    @classmethod
    def read(cls, text: str) -> Calibration | None:
        """Return the calibration that a file carries, or None where it is not one of ours."""
        try:
            found = cls.model_validate_json(text)
            canonical_json(found.info)  # pydantic lets NaN pass inside free JSON
        except (ValidationError, InputError):
            return None
        return found

    def text(self) -> str:
        """Canonical JSON."""
        return canonical_json(self.model_dump(mode="json"), "The calibration").decode()


@dataclass(frozen=True)
class Foreign:
    """What a file of another program holds.

    Args:
        format: the row of `vectors.formats.kinds` that it was read by.
        directions: our block to fp32 `[D]`, with the file's own magnitudes: what its program adds
            at strength 1.
        model: what the file says of its model, such as `llama`; empty where it says nothing.
        layers: how many blocks the model has, where the file shows it.
        carried: the calibration, where the workbench wrote the file.
        notes: what was left out or changed on reading, a sentence each.
    """

    format: str
    directions: Mapping[int, Tensor]
    model: str = ""
    layers: int | None = None
    carried: Calibration | None = None
    notes: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """D."""
        return next(iter(self.directions.values())).shape[0]

    @property
    def magnitudes(self) -> dict[int, float]:
        """Block to the norm of its direction in the file."""
        return {b: float(v_D.double().norm()) for b, v_D in self.directions.items()}


def foreign(
    format: str,
    rows: Mapping[int, Tensor],
    source: str,
    *,
    model: str = "",
    layers: int | None = None,
    carried: Calibration | None = None,
    notes: tuple[str, ...] = (),
) -> Foreign:
    """Check the directions of a file; those that are 0 everywhere steer nothing and are left out.

    Raises:
        VectorFileError: no direction, unequal widths, or values that are not finite.
    """
    kept: dict[int, Tensor] = {}
    for block, given in sorted(rows.items()):
        v_D = given.detach().to("cpu", torch.float32).contiguous()
        if v_D.dim() != 1 or not v_D.numel():
            raise VectorFileError(
                f"{source} has a direction of shape {list(v_D.shape)} for block {block}; "
                "directions are one-dimensional, so export it again."
            )
        if not torch.isfinite(v_D).all():
            raise VectorFileError(
                f"{source} has values that are not finite in the direction of block {block}; "
                "extract it again."
            )
        if v_D.any():
            kept[block] = v_D
    zeros = sorted(set(rows) - set(kept))
    if zeros and kept:
        blocks = ", ".join(map(str, zeros))
        notes = (*notes, f"Left out the directions of blocks {blocks}, which are 0.")
    widths = {v_D.shape[0] for v_D in kept.values()}
    if len(widths) != 1:
        wrong = f"directions of widths {sorted(widths)}" if widths else "no direction but zeros"
        raise VectorFileError(f"{source} has {wrong}; check that it is a whole steering vector.")
    found = Foreign(format, kept, model, layers, carried, notes)
    if carried is not None and not _fits(found, carried):
        words = "Its magnitudes are not those that its calibration explains; measure it again."
        found = replace(found, carried=None, notes=(*notes, words))
    return found


def calibrated(
    found: Foreign,
    calibration: Calibration,
    source: str,
    info: Mapping[str, Any] | None = None,
) -> SteeringVector:
    """Return the unit directions of `found` with the doses of `calibration`.

    `strength_one_is_dose` in the vector's info says, for each block, the dose that adds what the
    file's program adds at strength 1: `|direction_b| / mean_norm_b`.

    Raises:
        BlockNotFound: the calibration lacks a norm, or its best block has no direction.
    """
    lacking = sorted(set(found.directions) - set(calibration.mean_norms))
    if lacking:
        raise BlockNotFound(
            f"{source} has directions at blocks {lacking}, for which there is no mean norm; "
            "calibrate it with a contrast set."
        )
    if calibration.best_block not in found.directions:
        raise BlockNotFound(
            f"{source} has no direction at block {calibration.best_block}; "
            f"name one of its blocks {sorted(found.directions)}."
        )
    norms = {block: calibration.mean_norms[block] for block in found.directions}
    imported = {
        "format": found.format,
        "model": found.model,
        "notes": list(found.notes),
        "strength_one_is_dose": {
            str(b): size / norms[b] for b, size in found.magnitudes.items()
        },
        **(info or {}),
    }  # fmt: skip
    return SteeringVector(
        base=calibration.base,
        directions={
            b: (v_D.double() / v_D.double().norm()).float() for b, v_D in found.directions.items()
        },
        mean_norms=norms,
        best_block=calibration.best_block,
        info={**calibration.info, "imported": imported},
    )


def additions(vector: SteeringVector, blocks: list[int]) -> dict[int, Tensor]:
    """Return what dose 1 adds at each block, so that a file's strength is our dose.

    Raises:
        BlockNotFound: the vector lacks one of the blocks.
    """
    return {block: vector.addition(block, 1.0) for block in blocks}


def read_bytes(path: Path, limit: int = BIGGEST) -> bytes:
    """Return a file's bytes.

    Raises:
        VectorFileError: no such file, something that is no file, or far more than a vector has.
    """
    try:
        # A pipe or a device would never end.
        if path.exists() and not path.is_file():
            raise VectorFileError(f"{path} is not a file; name a steering-vector file.")
        size = path.stat().st_size
        if size > limit:
            raise VectorFileError(
                f"{path} has {size >> 20} MB, far more than a steering vector; check the file."
            )
        return path.read_bytes()
    except OSError as error:
        raise VectorFileError(
            f"{path} cannot be read ({error.strerror}); name a steering-vector file."
        ) from error


def _fits(found: Foreign, carried: Calibration) -> bool:
    """Whether the magnitudes are still those that were written: mean norm times a unit vector."""
    return carried.best_block in found.directions and all(
        math.isclose(size, carried.mean_norms.get(block, 0.0), rel_tol=SAME)
        for block, size in found.magnitudes.items()
    )
