"""How a model is composed of task vectors; the model itself can always be made again.

Removing a term and computing again from the base is exact. Subtracting it from weights that were
already rounded is not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, JsonValue, field_serializer, field_validator

from vectors.errors import GrammarError
from vectors.formats.canonical import canonical_json, sha256
from vectors.tasks.parameters import Parameters
from vectors.tasks.registry import Method, method_named

__all__ = ["Operation", "Recipe"]

WEIGHT_LIMIT = 1e6
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Operation(BaseModel):
    """A merge method with every one of its options, so that a later default changes no recipe.

    Raises:
        NameNotFound: no such method.
        InputError: options that the method does not have, or out of bounds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    options: dict[str, JsonValue] = {}

    @classmethod
    def of(cls, method: str, options: Mapping[str, Any]) -> Operation:
        """Return the operation with the options not given at their defaults."""
        parameters = method_named(method).read(options)
        return cls(method=method, options=parameters.model_dump(mode="json"))

    @property
    def row(self) -> Method:
        """The method's row of the registry."""
        return method_named(self.method)

    @property
    def parameters(self) -> Parameters:
        """The options as the method takes them."""
        return self.row.read(self.options)


LINEAR = Operation(method="linear")


class Recipe(BaseModel):
    """`W = W_0 + merge(weight_i, W_i - W_0)`, in fp32, rounded once at the end.

    `op` is a method of the registry: its name where the defaults do, or `Operation.of(...)`, or
    `{"method": ..., "options": {...}}`. The plain sum is written as "linear".

    The terms are summed in the order of their digests, since addition in floating point depends on
    the order. Terms of weight 0 add nothing and are left out, so recipes that mean the same are
    equal. Where one term alone changes a tensor linearly, at a weight of exactly 1, the result is
    the tuned tensor bit for bit.

    Raises:
        GrammarError: a base or term that is no digest, a term given twice, a weight not finite or over 1e6.
        NameNotFound: no such method.
        InputError: options that the method does not have, or out of bounds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    op: Operation = LINEAR
    base: str
    terms: tuple[tuple[str, float], ...]
    compute_dtype: Literal["float32"] = "float32"
    out_dtype: Literal["base"] = "base"

    @field_validator("op", mode="before")
    @classmethod
    def _is_complete(cls, op: Any) -> Any:
        if isinstance(op, str):
            return Operation.of(op, {})
        given = Operation.model_validate(op)
        return Operation.of(given.method, given.options)

    @field_serializer("op")
    def _plain(self, op: Operation) -> str | dict[str, JsonValue]:
        # Recipes of linear terms are spelt as they always were, and keep their digests.
        return "linear" if op == LINEAR else op.model_dump(mode="json")

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
            if abs(weight) > WEIGHT_LIMIT:
                raise GrammarError(
                    f"The weight of task vector {digest[:12]} is {weight:g}, and no more than "
                    f"{WEIGHT_LIMIT:g} can be summed in fp32; try 1."
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
