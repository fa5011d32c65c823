"""`workbench library`: merging by a method, the methods themselves, and interference."""

from __future__ import annotations

from typing import Any

import pytest
from safetensors.torch import load_file

from workbench.service import Workbench


@pytest.fixture(scope="module")
def wb(session_home: Any, tiny: Any) -> Any:
    """A home with three task vectors of the tiny model: up, its opposite, and another place."""
    found = Workbench(session_home.root, "tiny")
    model = found.model()
    weights = {k: v for f in model.folder.glob("*.safetensors") for k, v in load_file(f).items()}
    first, second = sorted(k for k in weights if k.endswith("mlp.down_proj.weight"))[:2]
    for name, key, step in (("up", first, 0.5), ("down", first, -0.5), ("aside", second, 0.5)):
        before = {key: weights[key]}
        after = {key: weights[key] + step * weights[key].abs().mean().to(weights[key].dtype)}
        found.library.save_task(name, model.base, before, after)
    return found


@pytest.fixture
def on(wb: Any, workbench: Any) -> Any:
    return lambda *words: workbench(
        "library", *words, "--home", str(wb.home.root), "--model", "tiny"
    )


def test_a_merge_is_a_recipe_that_makes_weights(wb: Any, on: Any) -> None:
    told = on("merge", "up=1,aside=0.5", "--name", "both", "--set", "density=0.5", "--json")
    assert (told.json["method"], told.json["revision"]) == ("ties", 1)
    recipe = wb.library.load_recipe("both")[1]
    assert recipe.op.method == "ties" and recipe.op.options["density"] == 0.5
    folder = wb.home.weights / wb.weights("both=1")
    assert (folder / "config.json").is_file()
    assert "by dare" in on("merge", "up=1,aside=1", "--name", "both", "--method", "dare").out
    # Another revision, and the older one still makes what it made.
    assert (
        wb.home.weights / wb.weights("both@1=1") == folder != wb.home.weights / wb.weights("both=1")
    )


def test_methods_are_listed_with_their_options(on: Any) -> None:
    rows = on("methods", "--json").json["methods"]
    assert {"linear", "ties", "dare", "della", "model-stock"} <= {row["name"] for row in rows}
    told = on("methods", "ties").out
    assert "arXiv:2306.01708" in told and "density" in told and "above 0 to 1" in told


def test_interference_tells_friend_from_foe(on: Any) -> None:
    found = on("interference", "up,down,aside", "--json").json
    pairs = {(p["first"], p["second"]): p for p in found["whole"]}
    assert pairs["down", "up"]["cosine"] == pytest.approx(-1, abs=1e-3)
    assert pairs["down", "up"]["conflict"] == 1
    assert pairs["aside", "up"]["cosine"] == 0 and pairs["aside", "up"]["overlap"] == 0
    assert "100%" in on("interference", "up,down", "--layers").out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["merge", "up=1", "--name", "x", "--method", "stock"], "no merge method 'stock'"),
        (["merge", "up=1", "--name", "x", "--method", "model-stock"], "at least 2"),
        (["merge", "up=1,aside=1", "--name", "x", "--set", "density=2"], "density"),
        (["merge", "up=1,aside=1", "--name", "x", "--set", "density"], "key=value"),
        (["merge", "up=1,aside=1", "--name", "x", "--set", "dense=1"], "no option 'dense'"),
        (["merge", "up=1,nothing=1", "--name", "x"], "nothing"),
        (["methods", "tires"], "no merge method 'tires'"),
        (["interference", "up"], "at least two"),
        (["interference", "up,nothing"], "nothing"),
    ],
)
def test_what_cannot_be_merged_is_a_sentence(on: Any, words: list[str], sentence: str) -> None:
    told = on(*words, "--json")
    assert told.code == 2 and sentence in told.json["error"]["message"]
