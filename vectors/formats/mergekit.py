"""mergekit's YAML recipes, as a method, its options and its terms.

What comes out is neutral: `method` and `options` are spelt as in the workbench's merge methods, and
a term is a model's name as the file has it, with its weight. Where mergekit's default would be
another computation than ours, the option says so; what cannot be said is refused, not dropped.

"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, ValidationError

from vectors.errors import InputError

__all__ = ["MERGEKIT", "ImportedRecipe", "Term", "read_mergekit"]

MERGEKIT = "mergekit"
BIGGEST = 1 << 20
ELECTING = ("ties", "dare_ties", "breadcrumbs_ties", "della")
METHODS = {
    "linear": "linear",
    "task_arithmetic": "linear",
    "ties": "ties",
    "dare_linear": "dare",
    "dare_ties": "dare",
    "breadcrumbs": "breadcrumbs",
    "breadcrumbs_ties": "breadcrumbs",
    "della": "della",
    "della_linear": "della",
    "sce": "sce",
    "model_stock": "model-stock",
}
NORMALISED = ("linear", "ties", "della")  # mergekit's default for `normalize`
DEFAULT_DENSITY, DEFAULT_GAMMA, DEFAULT_EPSILON = 1.0, 0.01, 0.15
SHARED = {"normalize", "lambda", "int8_mask", "rescale", "weight", "density", "gamma", "epsilon"}
PER_METHOD = {
    "linear": {"normalize", "weight"},
    "task_arithmetic": {"normalize", "lambda", "int8_mask", "weight", "rescale"},
    "sce": {"select_topk", "int8_mask"},
    "model_stock": {"filter_wise"},
}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(min_length=1, max_length=500)]
    parameters: dict[str, JsonValue] | None = None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    merge_method: str
    models: Annotated[list[_Model], Field(min_length=1, max_length=200)]
    base_model: str | None = None
    parameters: dict[str, JsonValue] | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    chat_template: str | None = None
    name: str | None = None


class Term(BaseModel):
    """A model's name as the file has it, and its weight."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    weight: FiniteFloat


class ImportedRecipe(BaseModel):
    """What a file means.

    Args:
        method: of the workbench's merge methods.
        options: of that method; those not named have its defaults.
        terms: the models other than the base, in the file's order.
        base: the base's name as the file has it; empty where the method has none.
        notes: where mergekit computes something slightly else, a sentence each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    options: dict[str, JsonValue]
    terms: tuple[Term, ...]
    base: str = ""
    notes: tuple[str, ...] = ()


class _Loader(yaml.SafeLoader):
    """Plain values only: no aliases, which can unfold to any size, and no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not supported")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
            raise yaml.YAMLError("keys must be text, each once")
        return super().construct_mapping(node, deep)


def read_mergekit(data: bytes, source: str) -> ImportedRecipe:
    """Read a recipe.

    Raises:
        InputError: not a recipe, a method that is not known, or something that a recipe of the
            workbench cannot say, such as slices, or parameters that change from layer to layer.
    """
    file = _parse(data, source)
    method = file.merge_method
    if method not in METHODS:
        raise InputError(
            f"{source} merges by {method[:40]!r}, which is not supported; "
            f"the methods are {', '.join(METHODS)}."
        )
    whole = {**(file.parameters or {})}
    known = PER_METHOD.get(method, SHARED)
    rows = [(m.model, {**(m.parameters or {})}) for m in file.models]
    for what in (whole, *(parameters for _, parameters in rows)):
        for key in what:
            if key not in known:
                raise InputError(
                    f"{source} has the parameter {key[:40]!r}, which {method} cannot be imported "
                    f"with; it may have {', '.join(sorted(known))}."
                )
    if file.tokenizer_source not in (None, "base"):
        raise InputError(
            f"{source} takes its tokenizer from {file.tokenizer_source[:60]!r}; "
            "all models must have the base's, so leave tokenizer_source out."
        )
    terms = [(name, p) for name, p in rows if name != file.base_model]
    if len({name for name, _ in terms}) != len(terms):
        raise InputError(f"{source} names a model twice; give each one once.")
    if method != "linear" and not file.base_model:
        raise InputError(f"{source} has no base_model, which {method} needs; add it.")
    if not terms:
        raise InputError(f"{source} merges nothing but its base; add a model.")

    def number(key: str, parameters: Mapping[str, Any], default: float | None) -> float:
        found = parameters.get(key, whole.get(key, default))
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise InputError(
                f"{source} has {str(found)[:60]!r} for {key}; only one number for the whole model "
                "can be imported, not a list or a filter."
            )
        if not math.isfinite(found):
            raise InputError(f"{source} has {found} for {key}; give a finite number.")
        return float(found)

    def choice(key: str, default: bool) -> bool:
        found = whole.get(key, default)
        if not isinstance(found, bool):
            raise InputError(f"{source} has {str(found)[:60]!r} for {key}; it is true or false.")
        return found

    def common(key: str, default: float) -> float:
        found = {number(key, p, default) for _, p in terms}
        if len(found) != 1:
            raise InputError(
                f"{source} has several values of {key} ({', '.join(f'{x:g}' for x in sorted(found))}); "
                "a recipe has one for all its models."
            )
        return found.pop()

    unit = 1.0 if method in ("sce", "model_stock") else None
    weights = {name: number("weight", p, unit) for name, p in terms}
    scale = number("lambda", {}, 1.0) if "lambda" in known else 1.0
    normalise = choice("normalize", method in NORMALISED) if "normalize" in known else False
    options: dict[str, Any] = {}
    notes: list[str] = []
    if method == "linear":
        base = [number("weight", p, None) for name, p in rows if name == file.base_model]
        weights = _shares(weights, sum(base), normalise, source)
    elif method == "task_arithmetic":
        total = sum(weights.values()) if normalise else 1.0
        if abs(total) < 1e-8:
            total = 1.0
        weights = {name: weight * scale / total for name, weight in weights.items()}
    elif method in ("sce", "model_stock"):
        if method == "sce":
            options = {"density": number("select_topk", {}, 1.0)}
            notes.append(
                "mergekit selects a share of the elements that differ, and the workbench of all."
            )
        elif choice("filter_wise", False):
            raise InputError(f"{source} asks for filter_wise, which cannot be imported.")
    else:
        elects = method in ELECTING
        total = sum(weights.values())
        if normalise and not elects and abs(total) >= 1e-8:
            scale /= total
        options = {"scale": scale, "density": common("density", DEFAULT_DENSITY)}
        if method.startswith("breadcrumbs"):
            options["gamma"] = common("gamma", DEFAULT_GAMMA)
        if method.startswith("della"):
            options["epsilon"] = common("epsilon", DEFAULT_EPSILON)
        if elects:
            options["divisor"] = "signed-weights" if normalise else "none"
            options["zero_sum"] = "positive"
        if method == "ties":
            options["scope"] = "tensor"
        else:
            options["elect"] = elects
        rescales = choice("rescale", method.startswith(("dare", "della")))
        if rescales != method.startswith(("dare", "della")):
            raise InputError(
                f"{source} sets rescale to {str(rescales).lower()}, which {method} cannot be "
                "imported with; leave it out."
            )
        if rescales:
            notes.append(
                "mergekit rescales each tensor by one factor that its random draw gives; the "
                "workbench rescales each element by the inverse of its probability."
            )
    return ImportedRecipe(
        method=METHODS[method],
        options=options,
        terms=tuple(Term(model=name, weight=weight) for name, weight in weights.items()),
        base=file.base_model or "",
        notes=tuple(notes),
    )


def _shares(
    weights: dict[str, float], base: float, normalise: bool, source: str
) -> dict[str, float]:
    """Weights of a mean of models, as weights of task vectors; they have to add up to 1."""
    total = sum(weights.values()) + base
    if not normalise and abs(total - 1) > 1e-9:
        raise InputError(
            f"{source} adds models with weights that sum to {total:g} without normalising, which "
            "scales the base itself; let them sum to 1."
        )
    if abs(total) < 1e-8:
        raise InputError(f"{source} has weights that sum to 0, so they have no mean; change one.")
    return {name: weight / total for name, weight in weights.items()} if normalise else weights


def _parse(data: bytes, source: str) -> _File:
    try:
        if len(data) > BIGGEST:
            raise InputError(f"{source} is far larger than a recipe; check the file.")
        raw = yaml.load(data.decode(), _Loader)
        if isinstance(raw, dict) and "slices" in raw:
            raise InputError(
                f"{source} assembles slices of layers, which is no sum of task vectors; "
                "only recipes with 'models' can be imported."
            )
        return _File.model_validate(raw)
    except ValidationError as error:
        row = error.errors(include_url=False)[0]
        raise InputError(
            f"{source} is not a mergekit recipe ({'.'.join(map(str, row['loc']))[:80]}: {row['msg']});"
            " check the file."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError, TypeError) as error:
        words = " ".join(str(error).split())[:120]
        raise InputError(f"{source} is not valid YAML ({words}); check the file.") from error
