"""Interference against its definition in plain Python, and what layers add up to."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vectors.errors import InputError, ShapeMismatch
from vectors.store import Checkpoint, Library, base_digest
from vectors.tasks.interference import deltas_of, interference, layer_of
from vectors.tasks.sources import FolderTerm, LibraryTerm

NAMES = ("model.embed.weight", "model.layers.0.q.weight", "model.layers.10.q.weight")
NAMES = (*NAMES, "model.layers.2.q.weight", "model.layers.2.k.weight")


def deltas(seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(6, 7, generator=rng) for name in NAMES}
    for x in found.values():
        x[torch.rand(x.shape, generator=rng) < 0.3] = 0.0
    return found


TASKS = {"a": deltas(1), "b": deltas(2), "c": deltas(3)}
del TASKS["c"][NAMES[1]]


def plain(names: list[str], first: str, second: str) -> tuple[float, float, float, int]:
    dot = one = two = 0.0
    apart = shared = both = either = 0
    for name in names:
        rows = [
            TASKS[k][name].flatten().tolist() if name in TASKS[k] else [0.0] * 42
            for k in (first, second)
        ]
        tops = []
        for row in rows:
            ranked = sorted((i for i in range(42) if row[i]), key=lambda i: -abs(row[i]))
            tops.append(set(ranked[: int(0.2 * 42)]))
        both, either = both + len(tops[0] & tops[1]), either + len(tops[0] | tops[1])
        for x, y in zip(*rows, strict=True):
            dot, one, two = dot + x * y, one + x * x, two + y * y
            shared, apart = shared + (x * y != 0), apart + (x * y < 0)
    cosine = dot / math.sqrt(one * two) if one * two else 0.0
    return cosine, apart / shared if shared else 0.0, both / either if either else 0.0, shared


def test_every_number_by_its_definition() -> None:
    done: list[str] = []
    found = interference(
        "cab",
        NAMES,
        lambda n: {k: d[n] for k, d in TASKS.items() if n in d},
        progress=done.append,
    )
    assert done == list(NAMES)
    pairs = list(combinations("abc", 2))
    layers = {"0": [NAMES[1]], "2": [NAMES[3], NAMES[4]], "10": [NAMES[2]], "other": [NAMES[0]]}
    assert list(found.layers) == list(layers)
    places = [(found.tensors[n], [n]) for n in NAMES] + [(found.whole, list(NAMES))]
    places += [(found.layers[layer], names) for layer, names in layers.items()]
    for rows, names in places:
        assert [(r.first, r.second) for r in rows] == pairs
        for row in rows:
            numbers = (row.cosine, row.conflict, row.overlap, row.shared)
            assert numbers == pytest.approx(plain(names, row.first, row.second))
    for key, norm in found.norms.items():
        squares = sum(float((x.double() ** 2).sum()) for x in TASKS[key].values())
        assert norm == pytest.approx(math.sqrt(squares))


def test_with_itself_and_with_its_opposite() -> None:
    x = deltas(5)
    tasks = {"x": x, "same": x, "opposite": {n: -t for n, t in x.items()}}
    found = interference(tuple(tasks), NAMES, lambda n: {k: d[n] for k, d in tasks.items()})
    rows = {(r.first, r.second): r for r in found.whole}
    same, opposite = rows["same", "x"], rows["opposite", "x"]
    assert (round(same.cosine, 12), same.conflict, same.overlap) == (1.0, 0.0, 1.0)
    assert (round(opposite.cosine, 12), opposite.conflict, opposite.overlap) == (-1.0, 1.0, 1.0)


def test_deltas_come_from_the_library_and_from_folders(tmp_path: Path) -> None:
    base = {name: torch.ones(6, 7) for name in NAMES}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    checkpoint, library = Checkpoint(tmp_path / "base"), Library(tmp_path / "library")
    digest, terms = base_digest(tmp_path / "base"), []
    for key, changes in TASKS.items():
        tuned = {
            name: base[name] + changes[name] if name in changes else base[name] for name in base
        }
        (tmp_path / key).mkdir()
        save_file(tuned, tmp_path / key / "model.safetensors")
        terms.append(FolderTerm(f"{key}-folder", tmp_path / key, checkpoint))
        entry = library.save_task(key, digest, base, tuned)
        terms.append(LibraryTerm(key, library, entry.manifest, checkpoint))
    found = interference([t.key for t in terms], NAMES, deltas_of(checkpoint, terms))
    rows = {(r.first, r.second): r for r in found.whole}
    assert round(rows["a", "a-folder"].cosine, 9) == 1.0
    assert rows["a", "b-folder"].shared == rows["a", "b"].shared
    assert rows["a", "b-folder"].cosine == rows["a", "b"].cosine


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.mlp.up_proj.weight", "12"),
        ("transformer.h.3.attn.c_attn.weight", "3"),
        ("blocks.0.norm.weight", "0"),
        ("lm_head.weight", "other"),
    ],
)
def test_layers_are_read_from_names(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_refusals() -> None:
    with pytest.raises(InputError, match="at least two"):
        interference("aa", NAMES, lambda n: {})
    with pytest.raises(InputError, match="density must lie above 0"):
        interference("ab", NAMES, lambda n: {}, density=0)
    with pytest.raises(ShapeMismatch, match="'t' has the shapes"):
        interference("ab", ["t"], lambda n: {"a": torch.ones(2), "b": torch.ones(3)})
    with pytest.raises(InputError, match="not finite"):
        interference("ab", ["t"], lambda n: {"a": torch.tensor([float("nan")])})
