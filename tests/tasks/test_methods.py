"""Each method against its definition in plain loops or float64, and what a row of the registry says.

Shape letters: M rows, N columns.
"""

from __future__ import annotations

import hashlib

import pytest
import torch

from vectors.errors import InputError, NameNotFound, ShapeMismatch
from vectors.tasks import METHODS, merge, method_named
from vectors.tasks.masks import uniforms

SHAPES = {"matrix": (7, 5), "wide": (3, 11), "vector": (13,), "number": (), "none": (0,)}


def task(seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}


TERMS = {"a": (1.0, task(1)), "b": (-0.5, task(2)), "c": (2.0, task(3))}


@pytest.mark.parametrize("name", METHODS)
def test_a_row_says_what_it_is(name: str) -> None:
    row = METHODS[name]
    assert row.name == name
    assert (
        row.summary.endswith(".") and "arXiv:" in row.paper and row.code.startswith("github.com/")
    )
    for option, field in row.parameters.model_fields.items():
        assert (field.description or "").endswith("."), option
        assert not field.is_required(), option


@pytest.mark.parametrize("name", METHODS)
def test_merged_deltas_are_fp32_of_every_shape(name: str) -> None:
    merged = merge(name, TERMS)
    assert {key: (tuple(x.shape), x.dtype) for key, x in merged.items()} == {
        key: (shape, torch.float32) for key, shape in SHAPES.items()
    }
    assert all(torch.isfinite(x).all() for x in merged.values())


def test_breadcrumbs_in_plain_python() -> None:
    delta = task(5)["vector"]
    order = sorted(range(13), key=lambda i: -abs(float(delta[i])))
    options = {"density": 0.5, "gamma": 0.2}  # of 13: leave out 2, keep the next 6
    merged = merge("breadcrumbs", {"a": (-2.0, {"t": delta})}, options)["t"]
    expected = [-2 * float(delta[i]) if i in order[2:8] else 0.0 for i in range(13)]
    assert merged.tolist() == expected


def test_sce_in_plain_python() -> None:
    rows = [[w * x for x in deltas["vector"].tolist()] for w, deltas in TERMS.values()]
    means = [sum(column) / 3 for column in zip(*rows, strict=True)]
    spread = [sum((row[i] - means[i]) ** 2 for row in rows) for i in range(13)]
    chosen = sorted(range(13), key=lambda i: -spread[i])[:5]
    energy = [sum(row[i] ** 2 for i in chosen) for row in rows]
    expected = [0.0] * 13
    for i in chosen:
        sign = sum(row[i] for row in rows)
        agree = [k for k in range(3) if rows[k][i] * sign > 0]
        share = sum(energy[k] for k in agree)
        expected[i] = sum(energy[k] * rows[k][i] for k in agree) / share
    merged = merge("sce", TERMS, {"density": 0.4})["vector"]
    torch.testing.assert_close(merged, torch.tensor(expected))


def test_tsv_by_its_definition() -> None:
    u, s, v = [], [], []
    for weight, deltas in TERMS.values():
        u_MM, s_M, vt_MN = torch.linalg.svd(weight * deltas["matrix"].double(), full_matrices=False)
        u.append(u_MM[:, :1])  # floor(5 / 3) of the rank each
        s.append(s_M[:1])
        v.append(vt_MN[:1].T)

    def whiten(x: torch.Tensor) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(x.T @ x)
        return x @ vectors @ torch.diag(values**-0.5) @ vectors.T

    expected = whiten(torch.cat(u, 1)) @ torch.diag(torch.cat(s)) @ whiten(torch.cat(v, 1)).T
    merged = merge("tsv-m", TERMS)["matrix"]
    torch.testing.assert_close(merged.double(), expected, atol=1e-6, rtol=1e-5)


def test_tsv_of_one_term_or_of_equal_terms_is_the_term() -> None:
    delta = {"t": task(4)["matrix"]}
    torch.testing.assert_close(merge("tsv-m", {"a": (1.0, delta)})["t"], delta["t"])
    low = {"t": torch.outer(torch.arange(4.0), torch.arange(1.0, 7.0))}
    both = merge("tsv-m", {"a": (1.0, low), "b": (1.0, low)})["t"]
    torch.testing.assert_close(both, low["t"])


def test_iso_has_one_singular_value() -> None:
    merged = merge("iso-c", TERMS)["matrix"]
    total = sum(w * d["matrix"].double() for w, d in TERMS.values())
    mean = torch.linalg.svdvals(total).mean().float()
    torch.testing.assert_close(torch.linalg.svdvals(merged), mean.expand(5))
    inner = (merged.double() * total).sum()
    torch.testing.assert_close(inner, mean.double() * torch.linalg.svdvals(total).sum())


def test_model_stock_by_its_formula() -> None:
    x, y = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 0.0])  # cosine 1/2
    merged = merge("model-stock", {"a": (1.0, {"t": x}), "b": (1.0, {"t": y})})["t"]
    torch.testing.assert_close(merged, (2 * 0.5 / 1.5) * (x + y) / 2)
    apart = merge("model-stock", {"a": (1.0, {"t": x}), "b": (-1.0, {"t": y})})["t"]
    assert not apart.count_nonzero()
    with pytest.raises(InputError, match="needs at least 2 task vectors, not 1"):
        merge("model-stock", {"a": (1.0, {"t": x}), "b": (0.0, {"t": y})})


def test_della_shares_the_rank_of_equals_and_keeps_what_it_must() -> None:
    delta = torch.tensor([[3.0, -1.0, 1.0, 2.0]])
    kept = merge("della", {"a": (1.0, {"t": delta})}, {"density": 0.5, "epsilon": 0.5 - 1e-9})
    assert kept["t"][0, 0] == 3.0  # the largest of the row: probability 1
    flat = merge("della", {"a": (1.0, {"t": torch.ones(4000)})}, {"density": 0.5, "epsilon": 0.4})
    assert set(flat["t"].unique().tolist()) == {0.0, 2.0}


def test_masks_are_even_apart_and_pinned() -> None:
    u = uniforms(0, "a", "t", torch.Size([100_000]))
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 0.005 and abs(float(u.var()) - 1 / 12) < 0.002
    for other in (("b", "t", 0), ("a", "s", 0), ("a", "t", 1)):
        v = uniforms(other[2], other[0], other[1], u.shape)
        assert abs(float(torch.corrcoef(torch.stack([u, v]))[0, 1])) < 0.02
    assert torch.equal(u[:7], uniforms(0, "a", "t", torch.Size([7])))


def test_masks_are_splitmix() -> None:
    start = int.from_bytes(hashlib.sha256(b'[7,"a","t"]').digest()[:8], "little")
    for i, u in enumerate(uniforms(7, "a", "t", torch.Size([50])).tolist()):
        z = (start + (i + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        assert u == ((z ^ (z >> 31)) >> 11) / 2**53


def test_dare_elects_when_asked() -> None:
    terms = {
        "a": (1.0, {"t": torch.tensor([1.0, 1.0])}),
        "b": (1.0, {"t": torch.tensor([3.0, -2.0])}),
    }
    options = {"density": 1.0}
    assert merge("dare", terms, options)["t"].tolist() == [4.0, -1.0]
    assert merge("dare", terms, {**options, "elect": True})["t"].tolist() == [2.0, -2.0]
    counted = {**options, "elect": True, "vote": "count", "zero_sum": "positive"}
    assert merge("dare", terms, counted)["t"].tolist() == [2.0, 1.0]
    over = {**options, "elect": True, "divisor": "terms"}
    assert merge("dare", terms, over)["t"].tolist() == [2.0, -1.0]


def test_refusals() -> None:
    with pytest.raises(NameNotFound, match="no merge method 'slerp'; use one of linear, ties"):
        method_named("slerp")
    with pytest.raises(InputError, match="'ties' has no option 'k'; it has scale, election"):
        merge("ties", TERMS, {"k": 20})
    with pytest.raises(InputError, match="outside 0 to 1; take a smaller epsilon"):
        merge("della", TERMS, {"density": 0.1, "epsilon": 0.2})
    with pytest.raises(InputError, match="make more than 1"):
        merge("breadcrumbs", TERMS, {"density": 0.999})
    with pytest.raises(InputError, match="option scale of 'sce' cannot be 'nan'"):
        merge("sce", TERMS, {"scale": float("nan")})
    with pytest.raises(InputError, match="'t' by values that are not finite"):
        merge("ties", {"a": (1.0, {"t": torch.tensor([1.0, float("inf")])})})
    with pytest.raises(ShapeMismatch, match=r"'t' is \[3\] in b and \[2\] in a"):
        merge("ties", {"a": (1.0, {"t": torch.ones(2)}), "b": (1.0, {"t": torch.ones(3)})})
