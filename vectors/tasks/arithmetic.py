"""Arithmetic on recipes: each gives another recipe, which is computed anew from the base.

What a recipe says can be undone exactly, because nothing is ever subtracted from rounded weights.
"""

from __future__ import annotations

from collections.abc import Mapping

from vectors.errors import InputError, ModelMismatch, NameNotFound
from vectors.tasks.recipes import LINEAR, Operation, Recipe

__all__ = ["add", "analogy", "merged_by", "negate", "reweight", "scale", "without"]


def add(*recipes: Recipe) -> Recipe:
    """Return the sum of linear recipes; a task vector in several gets its total weight.

    Raises:
        InputError: no recipe, or one of another method, whose sum with others is no recipe.
        ModelMismatch: recipes of different bases.
    """
    if not recipes:
        raise InputError("There is no recipe to add; give at least one.")
    weights: dict[str, float] = {}
    for recipe in recipes:
        if recipe.op != LINEAR:
            raise InputError(
                f"A recipe of the method '{recipe.op.method}' cannot be added to others; "
                "put its terms into one recipe."
            )
        if recipe.base != recipes[0].base:
            raise ModelMismatch(
                f"The recipes are for bases {recipes[0].base[:12]} and {recipe.base[:12]}; "
                "add recipes of one base."
            )
        for digest, weight in recipe.terms:
            weights[digest] = weights.get(digest, 0.0) + weight
    return _with_terms(recipes[0], weights)


def scale(recipe: Recipe, factor: float) -> Recipe:
    """Return the recipe whose merged task vector is `factor` times as long.

    Raises:
        GrammarError: a weight that is not finite then.
        InputError: a factor that is out of the method's bounds.
    """
    if recipe.op == LINEAR:
        return _with_terms(recipe, {digest: weight * factor for digest, weight in recipe.terms})
    options = recipe.op.options
    scaled = {**options, "scale": float(str(options["scale"])) * factor}
    return recipe.model_copy(update={"op": Operation.of(recipe.op.method, scaled)})


def negate(recipe: Recipe) -> Recipe:
    """Return the recipe of the opposite task vector."""
    return scale(recipe, -1.0)


def analogy(a: Recipe, b: Recipe, c: Recipe) -> Recipe:
    """Return `c + b - a`: what `b` is to `a`, done to `c`.

    Source: Ilharco et al., "Editing Models with Task Arithmetic" (arXiv:2212.04089), section 2.

    Raises:
        InputError, ModelMismatch: see `add`.
    """
    return add(c, b, negate(a))


def merged_by(op: Operation, *recipes: Recipe) -> Recipe:
    """Return the terms of linear recipes, merged by another method.

    Raises:
        InputError, ModelMismatch: see `add`.
    """
    return add(*recipes).model_copy(update={"op": op})


def without(recipe: Recipe, digest: str) -> Recipe:
    """Return the recipe as if the task vector had never been in it.

    Raises:
        NameNotFound: a task vector that is not in it.
    """
    return reweight(recipe, digest, 0.0)


def reweight(recipe: Recipe, digest: str, weight: float) -> Recipe:
    """Return the recipe with one task vector at another weight.

    Raises:
        NameNotFound: a task vector that is not in it.
        GrammarError: a weight that is not finite.
    """
    weights = dict(recipe.terms)
    if digest not in weights:
        raise NameNotFound(
            f"The recipe has no term {digest[:12]}; "
            f"it has {', '.join(d[:12] for d in weights) or 'none'}."
        )
    return _with_terms(recipe, {**weights, digest: weight})


def _with_terms(recipe: Recipe, weights: Mapping[str, float]) -> Recipe:
    return Recipe(op=recipe.op, base=recipe.base, terms=tuple(weights.items()))
