"""Task weights in a running engine: swapped in place, right to the digit, and named in every reply."""

from __future__ import annotations

import threading
import time

import httpx
import pytest
import torch
from safetensors.torch import load_file

from vectors.errors import InputError, NameNotFound, NameTaken
from workbench.engines.base import Request, Sampling
from workbench.engines.transformers import TransformersEngine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def tasks(tiny_workbench):
    """Two task vectors that move every matrix but the embedding."""
    model = tiny_workbench.model()
    base = load_file(model.folder / "model.safetensors")
    for number, name in enumerate(("tuned", "other")):
        generator = torch.Generator().manual_seed(number)
        moved = {
            key: value + torch.randn(value.shape, generator=generator).to(value.dtype) * 0.05
            for key, value in base.items()
            if "embed" not in key and value.ndim == 2
        }
        before = {key: base[key] for key in moved}
        tiny_workbench.library.save_task(name, model.base, before, moved, info={})
    return tiny_workbench


def ask(weights, tokens=8, text="hello"):
    return Request(
        ({"role": "user", "content": text},), weights=weights, sampling=Sampling(tokens, 0.0)
    )


PAIRS = [([10, 20, 30, 40], [50, 60, 70]), (list(range(4, 90)), [100, 101])]


def test_swapped_weights_score_like_a_fresh_load(tasks):
    engine = tasks.engine()
    fresh = TransformersEngine(tasks.model(), tasks.library, tasks.home)
    before = engine.score(PAIRS)
    found = {}
    for terms in ("tuned=1", "tuned=-1", "tuned=0.5,other=0.25", "other=1"):
        weights = tasks.weights(terms)
        found[terms] = engine.score(PAIRS, weights=weights)
        assert found[terms] == pytest.approx(fresh.score(PAIRS, weights=weights), abs=1e-3), terms
    assert engine.score(PAIRS) == pytest.approx(before, abs=1e-5), "the base came back changed"
    assert len({tuple(round(x, 2) for x in row) for row in found.values()}) == 4


def test_every_reply_names_its_weights(tasks):
    engine = tasks.engine()
    weights = [tasks.weights(t) for t in ("", "tuned=1", "other=1")]
    replies = engine.generate([ask(w) for w in weights * 3])
    assert [reply.weights for reply in replies] == weights * 3
    texts = [reply.text for reply in replies]
    assert texts[:3] == texts[3:6] == texts[6:] and len(set(texts[:3])) > 1


def test_a_swap_waits_for_who_is_speaking(tasks):
    engine = tasks.engine()
    alone = [engine.generate([ask("base", 120)])[0].text]
    weights = tasks.weights("tuned=1")
    found = []
    speaking = threading.Thread(
        target=lambda: found.append(engine.generate([ask("base", 120)])[0].text)
    )
    speaking.start()
    time.sleep(0.2)
    assert engine.generate([ask(weights)])[0].weights == weights
    speaking.join()
    assert found == alone


def test_removing_a_term_is_exact(tasks):
    both = tasks.weights("tuned=1,other=1")
    assert both != tasks.weights("tuned=1") == tasks.weights("tuned=1,other=0")
    assert tasks.weights("tuned=1,other=-0") == tasks.weights("tuned=1")
    assert tasks.weights("tuned=0") == "base"


def test_recipes_are_named_and_opened(tasks):
    tasks.combine("blend", "tuned=1,other=0.5")
    assert tasks.weights("blend=1") == tasks.weights("tuned=1,other=0.5")
    assert tasks.weights("blend=-2") == tasks.weights("tuned=-2,other=-1")
    tasks.negate("tuned", "anti")
    assert tasks.weights("anti") == tasks.weights("tuned=-1")
    with pytest.raises(NameTaken):
        tasks.combine("tuned", "other=1")


def test_bad_weights_are_refused_in_a_sentence(tasks):
    with pytest.raises(NameNotFound, match="nobody"):
        tasks.weights("nobody=1")
    with pytest.raises(InputError, match="finite"):
        tasks.weights("tuned=nan")
    engine = tasks.engine()
    with pytest.raises(InputError, match="not materialised"):
        engine.generate([ask("0" * 64)])
    with pytest.raises(InputError, match="64 hex"):
        engine.generate([ask("../../etc")])


def test_strangers_may_neither_ask_nor_move_the_weights(tasks):
    status = tasks.engine_status()
    weights = tasks.weights("tuned=1")
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    reply = httpx.post(
        f"{status.url}/v1/completions", json=body, headers={"x-workbench-weights": weights}
    )
    assert reply.status_code == 401
    assert httpx.get(f"{status.url}/workbench/hello").status_code == 401
    assert tasks.engine().generate([ask("base")])[0].weights == "base"
