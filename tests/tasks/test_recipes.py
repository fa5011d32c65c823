"""A recipe's value and digest."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vectors.errors import GrammarError, InputError, ModelMismatch, NameNotFound, ShapeMismatch
from vectors.tasks import METHODS, Operation, Recipe, combine, linear
from vectors.tasks.arithmetic import add, analogy, merged_by, negate, reweight, scale, without

A, B, C = "a" * 64, "b" * 64, "c" * 64


def test_golden_digest() -> None:
    recipe = Recipe(base=C, terms=((B, 1), (A, -0.5)))
    assert recipe.to_json() == (
        b'{"base":"' + C.encode() + b'","compute_dtype":"float32","op":"linear","out_dtype":"base",'
        b'"terms":[["' + A.encode() + b'",-0.5],["' + B.encode() + b'",1.0]]}'
    )
    assert recipe.digest.startswith("d83ccebad9605ee7")


def test_order_and_zero_terms_do_not_matter() -> None:
    assert Recipe(base=C, terms=((A, 1.0), (B, 0.0))) == Recipe(base=C, terms=((A, 1.0),))
    forth, back = (Recipe(base=C, terms=t) for t in (((A, 1.0), (B, 2.0)), ((B, 2.0), (A, 1.0))))
    assert forth.digest == back.digest
    assert Recipe.model_validate_json(forth.to_json()) == forth


@pytest.mark.parametrize(
    ("base", "terms", "words"),
    [
        ("../x", (), "base must be a digest"),
        (C, (("cheerful", 1.0),), "'cheerful'"),
        (C, ((A, float("nan")),), "must be finite"),
        (C, ((A, 1.0), (A, 2.0)), "twice"),
    ],
)
def test_refusals(base: str, terms: tuple, words: str) -> None:
    with pytest.raises(GrammarError, match=words):
        Recipe(base=base, terms=terms)


def rows(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    base = torch.randn(2000, generator=rng).to(dtype)
    one, two = ((base + 0.01 * torch.randn(2000, generator=rng)).to(dtype) for _ in range(2))
    return base, one, two


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_combine_is_the_equation_rounded_once(dtype: torch.dtype) -> None:
    base, one, two = rows(dtype)
    w0, w1, w2 = (x.float() for x in (base, one, two))
    expected = (w0 + (0.7 * (w1 - w0) + -1.5 * (w2 - w0))).to(dtype)
    assert torch.equal(combine(base, [(0.7, one), (-1.5, two)]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weight_one_is_the_tuned_tensor(dtype: torch.dtype) -> None:
    base, one, _ = rows(dtype)
    one[0] = float("nan")
    assert combine(base, [(1.0, one)]) is one
    assert torch.equal(combine(base, []), base)


def test_what_no_term_moves_keeps_its_bits() -> None:
    base = torch.tensor([-0.0, float("inf"), float("nan"), 1.0]).bfloat16()
    tuned = base.clone()
    tuned[3] = 2.0
    mixed = combine(base, [(0.5, tuned), (0.25, tuned)])
    assert torch.equal(mixed[:3].view(torch.int16), base[:3].view(torch.int16))
    assert mixed[3] == 1.75


def test_parts_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    base, one, two = (x[:1995].reshape(5, 399).T for x in rows(torch.bfloat16))
    terms = [(0.7, one), (-1.5, two)]
    whole = combine(base, terms)
    monkeypatch.setattr(linear, "PART", 7)
    assert torch.equal(combine(base, terms), whole)


def test_shapes_must_be_alike() -> None:
    base, one, _ = rows(torch.bfloat16)
    with pytest.raises(ShapeMismatch, match="same shape"):
        combine(base.reshape(4, 500), [(1.0, one.reshape(500, 4))])


def test_integers_are_not_mixed() -> None:
    base = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ShapeMismatch, match="weight 1"):
        combine(base, [(0.5, base + 1)])
    assert torch.equal(combine(base, [(1.0, base + 1)]), base + 1)


def test_a_recipe_names_a_method_with_all_of_its_options() -> None:
    recipe = Recipe.model_validate({"op": "ties", "base": C, "terms": [[A, 1], [B, -0.5]]})
    spelt = Operation.of("ties", {"density": 0.2, "scope": "global"})
    assert recipe == Recipe(op=spelt, base=C, terms=((B, -0.5), (A, 1.0)))
    assert set(recipe.op.options) == set(METHODS["ties"].parameters.model_fields)
    assert Recipe.model_validate_json(recipe.to_json()) == recipe
    assert recipe.to_json().startswith(b'{"base":"' + C.encode() + b'","compute_dtype":"float32",')
    assert recipe.digest.startswith("7fce3d6d82ca2af7")
    assert recipe.digest != Recipe(op=Operation.of("ties", {"density": 0.3}), **plain()).digest


def plain() -> dict[str, Any]:
    return {"base": C, "terms": ((A, 1.0), (B, -0.5))}


def test_methods_and_options_are_checked() -> None:
    with pytest.raises(NameNotFound, match="no merge method 'slerp'"):
        Recipe.model_validate({"op": "slerp", **plain()})
    with pytest.raises(InputError, match="option density of 'ties' cannot be '2'"):
        Recipe.model_validate({"op": {"method": "ties", "options": {"density": 2}}, **plain()})
    with pytest.raises(InputError, match="'linear' has no option 'scale'; it has none"):
        Recipe.model_validate({"op": {"method": "linear", "options": {"scale": 2}}, **plain()})


def test_arithmetic_gives_recipes() -> None:
    a, b, c = (Recipe(base=C, terms=((x, 1.0),)) for x in (A, B, C))
    assert analogy(a, b, c).terms == ((A, -1.0), (B, 1.0), (C, 1.0))
    assert add(a, a, negate(b)).terms == ((A, 2.0), (B, -1.0))
    assert add(a, negate(a)).terms == ()
    assert without(add(a, b), A) == b
    assert reweight(add(a, b), B, 0.5).terms == ((A, 1.0), (B, 0.5))
    merged = merged_by(Operation.of("ties", {"scale": 0.5}), a, b)
    assert scale(merged, 3.0).op.options["scale"] == 1.5
    assert negate(negate(merged)) == merged
    assert without(merged, A) == merged_by(Operation.of("ties", {"scale": 0.5}), b)
    with pytest.raises(InputError, match="of the method 'ties' cannot be added"):
        add(a, merged)
    with pytest.raises(ModelMismatch, match="recipes of one base"):
        add(a, Recipe(base=A, terms=()))
    with pytest.raises(NameNotFound, match="has no term cccccccccccc"):
        without(merged, C)
