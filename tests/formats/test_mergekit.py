"""mergekit recipes: what each method means, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vectors.errors import InputError
from vectors.formats.mergekit import METHODS, ImportedRecipe, read_mergekit

TWO = """
models:
  - model: org/base
  - model: org/one
    parameters: {weight: 0.5, density: 0.3}
  - model: ./two
    parameters: {weight: -0.25, density: 0.3}
base_model: org/base
dtype: bfloat16
"""


def recipe(method: str, **parameters: Any) -> ImportedRecipe:
    text = TWO + f"merge_method: {method}\n"
    if method in ("linear", "task_arithmetic", "sce", "model_stock"):
        text = text.replace(", density: 0.3", "")
    if method in ("sce", "model_stock"):
        text = text.replace("weight: 0.5", "").replace("weight: -0.25", "")
    if parameters:
        text += f"parameters: {json.dumps(parameters)}\n"
    return read_mergekit(text.encode(), "m.yml")


def weights(found: ImportedRecipe) -> dict[str, float]:
    return {term.model: term.weight for term in found.terms}


@pytest.mark.parametrize(
    ("method", "given", "options", "first", "second"),
    [
        ("task_arithmetic", {}, {}, 0.5, -0.25),
        ("task_arithmetic", {"lambda": 2}, {}, 1.0, -0.5),
        ("task_arithmetic", {"normalize": True}, {}, 2.0, -1.0),
        (
            "ties",
            {},
            {"scale": 1.0, "density": 0.3, "scope": "tensor", "divisor": "signed-weights",
             "zero_sum": "positive"},
            0.5, -0.25,
        ),
        (
            "ties",
            {"normalize": False, "lambda": 0.5, "int8_mask": True},
            {"scale": 0.5, "density": 0.3, "scope": "tensor", "divisor": "none",
             "zero_sum": "positive"},
            0.5, -0.25,
        ),
        ("dare_linear", {}, {"scale": 1.0, "density": 0.3, "elect": False}, 0.5, -0.25),
        (
            "dare_linear",
            {"normalize": True},
            {"scale": 4.0, "density": 0.3, "elect": False},
            0.5, -0.25,
        ),
        (
            "dare_ties",
            {},
            {"scale": 1.0, "density": 0.3, "elect": True, "divisor": "none",
             "zero_sum": "positive"},
            0.5, -0.25,
        ),
        (
            "breadcrumbs",
            {"gamma": 0.02},
            {"scale": 1.0, "density": 0.3, "gamma": 0.02, "elect": False},
            0.5, -0.25,
        ),
        (
            "breadcrumbs_ties",
            {},
            {"scale": 1.0, "density": 0.3, "gamma": 0.01, "elect": True, "divisor": "none",
             "zero_sum": "positive"},
            0.5, -0.25,
        ),
        (
            "della",
            {"epsilon": 0.1},
            {"scale": 1.0, "density": 0.3, "epsilon": 0.1, "elect": True,
             "divisor": "signed-weights", "zero_sum": "positive"},
            0.5, -0.25,
        ),
        (
            "della_linear",
            {},
            {"scale": 1.0, "density": 0.3, "epsilon": 0.15, "elect": False},
            0.5, -0.25,
        ),
        ("sce", {"select_topk": 0.1}, {"density": 0.1}, 1.0, 1.0),
        ("model_stock", {}, {}, 1.0, 1.0),
    ],
)  # fmt: skip
def test_what_a_method_means(
    method: str, given: dict[str, Any], options: dict[str, Any], first: float, second: float
) -> None:
    found = recipe(method, **given)
    assert found.method == METHODS[method]
    assert found.options == options
    assert weights(found) == {"org/one": first, "./two": second}
    assert found.base == "org/base"


def test_a_mean_of_models_is_a_sum_of_task_vectors() -> None:
    # (1 M0 + 2 M1 + 5 M2) / 8 = M0 + 2/8 (M1 - M0) + 5/8 (M2 - M0)
    text = """
merge_method: linear
base_model: zero
models:
  - {model: zero, parameters: {weight: 1}}
  - {model: one, parameters: {weight: 2}}
  - {model: two, parameters: {weight: 5}}
"""
    found = read_mergekit(text.encode(), "m.yml")
    assert (found.method, found.options) == ("linear", {})
    assert weights(found) == {"one": 0.25, "two": 0.625}
    plain = text + "parameters: {normalize: false}\n"
    with pytest.raises(InputError, match="sum to 8"):
        read_mergekit(plain.encode(), "m.yml")
    good = plain.replace("weight: 1", "weight: -6")
    assert weights(read_mergekit(good.encode(), "m.yml")) == {"one": 2.0, "two": 5.0}
    with pytest.raises(InputError, match="sum to 0"):
        read_mergekit(text.replace("weight: 1", "weight: -7").encode(), "m.yml")


LAUGHS = "a: &a [x, x]\nb: &b [*a, *a]\nmodels: *b\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a mergekit recipe"),
        ("[1, 2", "not valid YAML"),
        ("\x00", "not valid YAML"),
        (LAUGHS, "aliases"),
        ("!!python/object/apply:os.system [ls]", "not valid YAML"),
        ("merge_method: ties\nmerge_method: sce\nmodels: []", "each once"),
        ("[" * 3000, "not valid YAML"),
        (TWO, "merge_method"),
        (TWO + "merge_method: slerp", "'slerp'"),
        (TWO + "merge_method: ties\nwizard: 1", "wizard"),
        (TWO + "merge_method: ties\nslices: []", "slices"),
        (TWO + "merge_method: ties\nparameters: {t: 1}", "'t'"),
        (TWO + "merge_method: ties\nparameters: {normalize: [1]}", "true or false"),
        (TWO + "merge_method: ties\ntokenizer_source: union", "tokenizer"),
        (TWO.replace("0.5", "[0, 1]") + "merge_method: ties", "list or a filter"),
        (TWO.replace("0.5", ".nan") + "merge_method: ties", "finite"),
        (TWO.replace("density: 0.3}\n  -", "density: 0.4}\n  -") + "merge_method: ties", "several"),
        (TWO.replace("./two", "org/one") + "merge_method: ties", "twice"),
        (TWO.replace("base_model: org/base", "") + "merge_method: ties", "no base_model"),
        (TWO.replace("weight: 0.5, ", "") + "merge_method: ties", "for weight"),
        (TWO + "merge_method: dare_ties\nparameters: {rescale: false}", "rescale"),
        ("merge_method: ties\nbase_model: a\nmodels: [{model: a}]", "nothing but its base"),
        ("x" * (1 << 20) + "x", "far larger"),
    ],
)
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        read_mergekit(text.encode(), "m.yml")
    assert "m.yml" in str(caught.value) and words in str(caught.value)
    assert str(caught.value).endswith(".")


def test_stock_by_filters_is_refused() -> None:
    with pytest.raises(InputError, match="filter_wise"):
        recipe("model_stock", filter_wise=True)


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["merge_method", "models", "model", "parameters", "weight"]), inner
            )
        ),
        max_leaves=12,
    )
)
def test_any_yaml_is_read_or_refused(value: Any) -> None:
    try:
        read_mergekit(yaml.safe_dump(value).encode(), "m.yml")
    except InputError as error:
        assert str(error).endswith(".")
