"""How a model is composed of task vectors; the model itself can always be made again.

Removing a term and computing again from the base is exact. Subtracting it from weights that were
already rounded is not.
"""

from __future__ import annotations

import math
import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, field_validator

from vectors.errors import GrammarError
from vectors.formats.canonical import canonical_json, sha256

__all__ = ["Recipe"]

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Recipe(BaseModel):
    """`W = W_0 + sum_i weight_i * (W_i - W_0)`, in fp32, rounded once at the end.

    The terms are summed in the order of their digests, since addition in floating point depends on
    the order. Terms of weight 0 add nothing and are left out, so recipes that mean the same are
    equal. Where one term alone changes a tensor, at a weight of exactly 1, the result is the tuned
    tensor bit for bit.

    Source: Ilharco et al., "Editing Models with Task Arithmetic" (arXiv:2212.04089), section 2.

    Raises:
        GrammarError: a base or term that is no digest, a term given twice, a weight not finite.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    op: Literal["linear"] = "linear"
    base: str
    terms: tuple[tuple[str, float], ...]
    compute_dtype: Literal["float32"] = "float32"
    out_dtype: Literal["base"] = "base"

    @field_validator("base")
    @classmethod
    def _is_digest(cls, base: str) -> str:
        if not _DIGEST.fullmatch(base):
            raise GrammarError(
                f"A recipe's base must be a digest of 64 hex digits, not {base[:80]!r}."
            )
        return base

    @field_validator("terms")
    @classmethod
    def _in_order(cls, terms: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
        digests = [digest for digest, _ in terms]
        for digest, weight in terms:
            if not _DIGEST.fullmatch(digest):
                raise GrammarError(
                    f"A recipe's term must be a task vector's digest, not {digest[:80]!r}; "
                    "resolve names in the library first."
                )
            if not math.isfinite(weight):
                raise GrammarError(
                    f"The weight of task vector {digest[:12]} must be finite, not {weight}; try 1."
                )
        if len(set(digests)) != len(digests):
            raise GrammarError(
                "A recipe names a task vector twice; give each one once, with its total weight."
            )
        return tuple(sorted((digest, weight) for digest, weight in terms if weight != 0))

    @property
    def digest(self) -> str:
        """SHA-256 of the recipe's canonical JSON; it names the weights that the recipe makes."""
        return sha256(self.to_json())

    def to_json(self) -> bytes:
        """The recipe as canonical JSON."""
        return canonical_json(self.model_dump(mode="json"))
