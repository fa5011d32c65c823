"""The merge methods: name, what it is, where it comes from, what it can be told, and the function.

Command line, page and documentation are made from these rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from vectors.errors import InputError, NameNotFound
from vectors.tasks.methods import (
    breadcrumbs,
    dare,
    della,
    isotropic,
    linear,
    sce,
    stock,
    ties,
    tsv,
)
from vectors.tasks.parameters import Parameters
from vectors.tasks.stack import Stack, Survey

__all__ = ["METHODS", "Method", "method_named"]

SIGNS = "A sum of exactly 0 elects nothing, so that negating the terms negates the result."
MASKS = "Each element's mask is a hash of seed, term, tensor and index, not of the order of work."


@dataclass(frozen=True)
class Method:
    """One way to merge task vectors.

    Args:
        name: what recipes call it.
        summary: one sentence.
        paper: where it was published.
        code: the authors' implementation, or the best known one.
        differs: where this one departs from published code, and why.
        parameters: what it can be told.
        merge: from the stack of one tensor to its merged delta, fp32.
        survey: what has to be known of the whole model first; None where one tensor is enough.
        least: the fewest terms it can merge.
    """

    name: str
    summary: str
    paper: str
    code: str
    differs: tuple[str, ...]
    parameters: type[Parameters]
    merge: Callable[[Stack, Any], Tensor]
    survey: Callable[[Callable[[], Iterable[Stack]], Any], Survey | None] | None = None
    least: int = 1

    def read(self, options: Mapping[str, Any]) -> Parameters:
        """Return the parameters that `options` give, the others at their defaults.

        Raises:
            InputError: an option that the method does not have, or a value out of bounds.
        """
        try:
            return self.parameters.model_validate(dict(options))
        except ValidationError as error:
            raise InputError(self._refusal(error)) from error

    def _refusal(self, error: ValidationError) -> str:
        row = error.errors(include_url=False)[0]
        option = ".".join(map(str, row["loc"]))
        if row["type"] == "extra_forbidden":
            known = ", ".join(self.parameters.model_fields) or "none"
            return f"The method '{self.name}' has no option {option[:60]!r}; it has {known}."
        words = row["msg"].removeprefix("Value error, ")
        if not option:
            return f"The method '{self.name}' cannot be used like this: {words}."
        return (
            f"The option {option} of '{self.name}' cannot be {str(row['input'])[:60]!r}: "
            f"{words[:1].lower()}{words[1:]}."
        )


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(
            "linear",
            "Adds the task vectors, each times its weight: add, negate, scale, analogy.",
            "Ilharco et al., Editing Models with Task Arithmetic (arXiv:2212.04089)",
            "github.com/mlfoundations/task_vectors",
            ("Weights are never normalised, and every tensor that one term lacks counts as 0.",),
            linear.LinearParameters,
            linear.merge,
        ),
        Method(
            "ties",
            "Trims small changes, elects a sign for each element, and merges the terms that agree.",
            "Yadav et al., TIES-Merging (arXiv:2306.01708)",
            "github.com/prateeky2806/ties-merging",
            (
                "Keeps floor(density * size) elements; the authors' code keeps one more "
                "(`rank: share-plus-one`).",
                "Keeps every element at the threshold; mergekit and peft choose among equals by "
                "their sort.",
                f"{SIGNS} The authors' code takes the sign that most elements elected "
                "(`zero_sum: majority`), mergekit and peft the positive one.",
                "Divides by the number of terms that agree; mergekit by the sum of their weights, "
                "which turns negation into addition (`divisor: signed-weights`).",
                "Density 1 keeps everything; the authors' code stops there.",
            ),
            ties.TiesParameters,
            ties.merge,
            ties.survey,
        ),
        Method(
            "dare",
            "Drops elements at random and rescales the rest, so that the expectation stays.",
            "Yu et al., Language Models are Super Mario (arXiv:2311.03099)",
            "github.com/yule-BUAA/MergeLM",
            (
                MASKS,
                "Rescales by exactly 1 / density; mergekit by the ratio of the tensor's L1 norms.",
            ),
            dare.DareParameters,
            dare.merge,
        ),
        Method(
            "della",
            "Drops elements at random, small ones more often, and rescales each by its own chance.",
            "Deep et al., DELLA-Merging (arXiv:2406.11617)",
            "github.com/declare-lab/della",
            (
                MASKS,
                "Rescales each element by its own 1 / p; mergekit by one factor a tensor.",
                "Elements of equal magnitude share the mean of their ranks.",
            ),
            della.DellaParameters,
            della.merge,
        ),
        Method(
            "breadcrumbs",
            "Leaves out the largest changes of each tensor, and the smallest.",
            "Davari and Belilovsky, Model Breadcrumbs (arXiv:2312.06795)",
            "github.com/rezazzr/breadcrumbs",
            ("Elements of equal magnitude stay or go together.",),
            breadcrumbs.BreadcrumbsParameters,
            breadcrumbs.merge,
        ),
        Method(
            "sce",
            "Selects elements in which the terms differ, weighs terms by their energy, and erases "
            "minority signs.",
            "Wan et al., FuseChat (arXiv:2408.07990)",
            "github.com/fanqiwan/FuseAI",
            (SIGNS, "The recipe's weights multiply the terms before all else."),
            sce.SceParameters,
            sce.merge,
        ),
        Method(
            "tsv-m",
            "Keeps each term's leading singular vectors, and takes the interference out of them.",
            "Gargiulo et al., Task Singular Vectors (arXiv:2412.00081)",
            "github.com/AntoAndGar/task_singular_vectors",
            (
                "Terms that leave a matrix alone take no share of its rank.",
                "Singular vectors of singular values 0 are left out, since they are arbitrary.",
            ),
            tsv.TsvParameters,
            tsv.merge,
        ),
        Method(
            "iso-c",
            "Gives all directions of the summed change the same strength.",
            "Marczak et al., No Task Left Behind (arXiv:2502.04959)",
            "github.com/danielm1405/iso-merging",
            (
                "The mean is over singular values that are not 0; the others' vectors are arbitrary.",
            ),
            isotropic.IsotropicParameters,
            isotropic.merge,
        ),
        Method(
            "model-stock",
            "Goes from the base towards the mean, as far as the angles between the terms say.",
            "Jang et al., Model Stock (arXiv:2403.19522)",
            "github.com/naver-ai/model-stock",
            (
                "One ratio a tensor, and a mean cosine below 0 counts as 0, where the formula has "
                "a pole.",
                "The recipe's weights multiply the terms before all else.",
            ),
            stock.StockParameters,
            stock.merge,
            least=2,
        ),
    )
}


def method_named(name: str) -> Method:
    """Return the row called `name`.

    Raises:
        NameNotFound: no such method.
    """
    if name not in METHODS:
        raise NameNotFound(
            f"There is no merge method {name[:60]!r}; use one of {', '.join(METHODS)}."
        )
    return METHODS[name]
