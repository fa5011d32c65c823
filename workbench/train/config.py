"""The settings of a training run, with the values that worked (facts of the bundled model)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vectors.errors import InputError
from vectors.grammar import NAME_LENGTH

__all__ = ["TrainConfig", "last_name"]

LAST = "-last"


def last_name(name: str) -> str:
    """What the last step's weights are called where those of a better one are called `name`."""
    return f"{name[: NAME_LENGTH - len(LAST)]}{LAST}"


class TrainConfig(BaseModel):
    """How decisions are learnt. The embedding and the output matrix never move.

    Args:
        learning_rate: with APOLLO and AdamW 5e-5 to 2e-4.
        optimizer: "apollo", "adamw" or "sgd".
        rank: APOLLO's.
        batch: steered decisions of one step; replay comes on top.
        replay: share of replay among all decisions of a step.
        passes: times that every steered decision is used.
        schedule: "linear" falls from the learning rate to nothing, "constant" stays.
        loss: "soft" learns the teacher's distributions, "tokens" the sampled tokens.
        tier: 2 freezes the context, 1 takes the gradient through it, 3 does so and recomputes the
            layers in the backward pass; "auto" picks by `workbench.train.tiers`.
        recompute: recompute the layers of the decision part at tiers 1 and 2, too.
        reuse: keep contexts that were read, at tier 2: on the "device", the "host" or "disk".
        refresh_every: steps after which a kept context is read again, to begin with.
        staleness: relative difference to a fresh context that is tolerated; sets how often.
        recorded: at tier 2, pad steps to a few shapes, which a GPU records and replays; worth it
            where contexts are reused and steps are many.
        seed: of the order, the projections and the rounding.
        clip: largest norm of the gradient.
        top_k: tokens kept of the teacher's distribution.
        held_out_every: steps between measurements on held-out decisions.
        checkpoint_every: steps between saves, where a run saves at all; kept contexts are read
            again then, so that a run that goes on from there is the same to the bit.
        patience: measurements on held-out decisions without improvement after which training stops;
            0 never stops early.
        keep: which weights become the result: the "best" on held-out decisions, the "last", or "both":
            the best are the result, and the last are kept beside them where they are others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    learning_rate: float = Field(1e-4, gt=0, le=1)
    optimizer: Literal["apollo", "adamw", "sgd"] = "apollo"
    rank: int = Field(256, ge=1)
    batch: int = Field(6, ge=1, le=4096)
    replay: float = Field(0.25, ge=0, lt=1)
    passes: int = Field(1, ge=1, le=1000)
    schedule: Literal["linear", "constant"] = "linear"
    loss: Literal["soft", "tokens"] = "soft"
    tier: Literal["auto", 1, 2, 3] = "auto"
    recompute: bool = False
    reuse: Literal["off", "device", "host", "disk"] = "off"
    refresh_every: int = Field(16, ge=1, le=1024)
    staleness: float = Field(0.05, gt=0, le=10)
    recorded: bool = False
    seed: int = Field(0, ge=0, lt=1 << 63)
    clip: float = Field(1.0, gt=0)
    top_k: int = Field(64, ge=1)
    held_out_every: int = Field(10, ge=1)
    checkpoint_every: int = Field(20, ge=1)
    patience: int = Field(0, ge=0, le=1000)
    keep: Literal["best", "last", "both"] = "both"

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Return the settings that `values` ask for, the others at their defaults.

        Raises:
            InputError: a setting that does not exist or is out of range.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the settings"
            raise InputError(f"The training setting '{where}' is wrong: {first['msg']}.") from error

    @property
    def rows(self) -> int:
        """Decisions of one step, replay among them; `batch / (1 - replay)`."""
        return math.ceil(self.batch / (1 - self.replay) - 1e-9)

    def rate_at(self, step: int, steps: int) -> float:
        """The rate of step `step`, counted from 1; linear is `lr (1 - (step - 1) / steps)`."""
        return self.learning_rate * (1 - (step - 1) / steps if self.schedule == "linear" else 1)
