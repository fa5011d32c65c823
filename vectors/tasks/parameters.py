"""What merge methods can be told: pydantic models from which forms, flags and tables are made."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Electing", "Election", "Parameters", "Scaled"]


class Parameters(BaseModel):
    """Base of every method's parameters; each field has a default, bounds, and a sentence."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Scaled(Parameters):
    """Parameters of a method whose result can be scaled."""

    scale: float = Field(
        1.0, ge=-100, le=100, description="Factor on the merged task vector; -1 negates it."
    )


class Election(Scaled):
    """How the terms agree on a sign, and what becomes of those that agree."""

    election: Literal["weighted", "unweighted"] = Field(
        "weighted",
        description="Whether signs are elected after the weights are applied, so that a negative "
        "weight votes for the opposite, or before.",
    )
    vote: Literal["sum", "count"] = Field(
        "sum", description="Whether the sign of the sum wins, or the sign that most terms have."
    )
    divisor: Literal["count", "weights", "signed-weights", "terms", "none"] = Field(
        "count",
        description="What the sum of the agreeing terms is divided by: their number, the sum of "
        "their weights' magnitudes, the sum of their weights, the number of all terms, or nothing.",
    )
    combine: Literal["sum", "max"] = Field(
        "sum",
        description="Whether agreeing terms are added and divided, or the largest one is taken.",
    )
    zero_sum: Literal["none", "positive", "majority"] = Field(
        "none",
        description="What an election that ends in exactly 0 gives: no change, the positive sign, "
        "or the sign that most elements elected.",
    )


class Electing(Election):
    """Parameters of a method for which the election is a choice."""

    elect: bool = Field(
        False,
        description="Whether terms elect a sign as in TIES; without it the weighted terms are "
        "added, and the fields on elections say nothing.",
    )
