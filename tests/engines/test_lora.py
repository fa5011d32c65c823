"""LoRAs for single requests in real vLLM: right to the digit, beside each other, stated and proved."""

from __future__ import annotations

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from vectors.errors import EngineFailed, InputError
from vectors.formats.peft import WEIGHTS, read_lora
from vectors.steering.controls import random_direction
from vectors.types import SteeringVector
from workbench.engines.base import Request, Sampling
from workbench.engines.lora import FILE, LoraFile
from workbench.engines.vllm.gate import HEADER
from workbench.engines.vllm.settings import LORA_RANK, LORA_SLOTS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
PAIRS = [([10, 20, 30, 40], [50, 60, 70]), (list(range(4, 90)), [100, 101])]
LONG = "Tell me a story about the sea. " * 20
FULL = {"as_": "lora", "rank": 64}


@pytest.fixture(scope="module")
def served(tmp_path_factory, tiny_folder):
    """A workbench on a tiny model whose engine has two slots, with task vectors and a vector."""
    pytest.importorskip("vllm", reason="vLLM is not installed on this machine")
    from workbench.service import Workbench

    root = tmp_path_factory.mktemp("loras") / "home"
    shutil.copytree(tiny_folder, root / "models" / "tiny")
    with pytest.MonkeyPatch.context() as patch, Workbench(root, "tiny") as wb:
        patch.setenv(LORA_SLOTS, "2")
        patch.setenv(LORA_RANK, "64")
        keep_tasks(wb)
        wb.start_engine()
        wb.engine()
        yield wb


def keep_tasks(wb):
    model = wb.model()
    base = load_file(model.folder / "model.safetensors")
    for number, name in enumerate(("tuned", "other", "third", "norms")):
        generator = torch.Generator().manual_seed(number)
        moved = {
            key: value + torch.randn(value.shape, generator=generator).to(value.dtype) * 0.05
            for key, value in base.items()
            if "embed" not in key and (value.ndim == 2 or name == "norms")
        }
        wb.library.save_task(name, model.base, {k: base[k] for k in moved}, moved, info={})
    directions = {b: random_direction(model.width, b) for b in range(4)}
    vector = SteeringVector(model.base, directions, dict.fromkeys(directions, 8.0), 2)
    wb.library.save_vector("north", vector)


def ask(weights="base", text="Hello there", steer="", tokens=12):
    return Request(({"role": "user", "content": text},), steer, weights, Sampling(tokens, 0.0))


def folder_of(wb, state):
    return wb.home.loras / state.removeprefix("lora:")


# -- in the engine ------------------------------------------------------------------------------


def test_full_rank_scores_like_the_swap_and_low_rank_does_not(served):
    engine = served.engine()
    found = {}
    for terms in ("tuned=1", "tuned=-1", "tuned=0.5,other=0.25"):
        lora, swap = served.weights(terms, **FULL), served.weights(terms)
        found[terms] = engine.score(PAIRS, weights=lora)
        assert found[terms] == pytest.approx(engine.score(PAIRS, weights=swap), abs=2e-3), terms
    base, low = (
        engine.score(PAIRS),
        engine.score(PAIRS, weights=served.weights("tuned=1", "lora", rank=2)),
    )
    rows = [*found.values(), base, low]
    apart = [abs(a[1] - b[1]) for n, a in enumerate(rows) for b in rows[:n]]
    assert min(apart) > 0.02, "what is compared would not tell one recipe from another"


def test_personalities_in_one_batch_each_speak_as_they_do_alone(served):
    engine = served.engine()
    states = ["base", *(served.weights(t, **FULL) for t in ("tuned=1", "other=1"))]
    alone = [engine.generate([ask(state)])[0].text for state in states]
    scores = [engine.score(PAIRS, weights=state) for state in states]
    assert len(set(alone)) == 3
    replies = engine.generate([ask(state, tokens=12) for state in states * 4])
    assert [reply.text for reply in replies] == alone * 4
    assert [reply.weights for reply in replies] == states * 4
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda state: engine.score(PAIRS, weights=state), states * 2))
    for row, wanted in zip(together, scores * 2, strict=True):
        assert row == pytest.approx(wanted, abs=2e-3)


def test_more_recipes_than_slots_take_turns(served):
    engine = served.engine()
    states = [served.weights(t, **FULL) for t in ("tuned=1", "other=1", "third=1", "third=-1")]
    alone = [engine.generate([ask(state)])[0].text for state in states]
    assert len(set(alone)) == 4
    for _ in range(2):
        replies = engine.generate([ask(state) for state in states + states[::-1]])
        assert [reply.text for reply in replies] == alone + alone[::-1]


def test_a_reply_names_recipe_rank_and_error(served):
    engine = served.engine()
    state = served.weights("norms=1", "lora", rank=4)
    stated = LoraFile.model_validate_json((folder_of(served, state) / FILE).read_bytes())
    streamed = list(engine.stream(ask(state)))[-1]
    for reply in (engine.generate([ask(state)])[0], streamed):
        assert reply.weights == state and reply.lora == stated.receipt
    assert reply.lora.recipe == served.weights("norms=1")
    assert reply.lora.rank == 4 and 0.2 < reply.lora.error < 1
    assert reply.lora.modules == 28 and reply.lora.left_out == 9
    assert engine.generate([ask()])[0].lora is None


def test_steering_and_lora_together(served):
    engine = served.engine()
    lora, swap = served.weights("tuned=1", **FULL), served.weights("tuned=1")
    both = engine.score(PAIRS, steer="north=0.7", weights=lora)
    assert both == pytest.approx(engine.score(PAIRS, steer="north=0.7", weights=swap), abs=2e-3)
    asked = [ask(), ask(steer="north=2"), ask(lora), ask(lora, steer="north=2")]
    alone = [engine.generate([request])[0] for request in asked]
    together = engine.generate(asked)
    assert [r.text for r in together] == [r.text for r in alone]
    assert len({r.text for r in together}) == 4
    assert together[3].receipt.prompt + together[3].receipt.cached > 0 and together[3].lora


def test_recipes_share_no_prefix_of_the_cache(served):
    engine = served.engine()
    terms = ("tuned=1", "other=1")
    wanted = [engine.generate([ask(served.weights(t), LONG)])[0].text for t in terms]
    clean = engine.generate([ask(text=LONG)])[0].text
    assert len({clean, *wanted}) == 3
    for _ in range(2):
        for term, text in zip(terms, wanted, strict=True):
            state = served.weights(term, **FULL)
            assert engine.generate([ask(state, LONG)])[0].text == text
            assert engine.generate([ask(text=LONG)])[0].text == clean


def test_the_service_serves_a_lora_from_its_terms(served):
    swapped = served.generate("Hello there", with_="tuned=1", temperature=0, max_tokens=12)
    reply = served.generate("Hello there", with_="tuned=1", temperature=0, max_tokens=12, **FULL)
    assert reply.text == swapped.text and reply.lora.rank == 64 and swapped.lora is None
    code = served.as_code(served.request("Hello", tasks="tuned=1", **FULL))
    assert reply.weights in code["curl"] and reply.weights in code["python"]


# -- what is refused ----------------------------------------------------------------------------


def copied(wb, state, digest, **changes):
    """The LoRA under another name, with other statements."""
    target = wb.home.loras / digest
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder_of(wb, state), target)
    stated = json.loads((target / FILE).read_text())
    (target / FILE).write_text(json.dumps({**stated, **changes}))
    return f"lora:{digest}"


def test_bad_input_is_refused_in_a_sentence(served):
    engine = served.engine()
    good = served.weights("tuned=1", **FULL)
    cases = {
        "lora:../../../models/tiny": "64 hex digits",
        "lora:": "64 hex digits",
        "lora:" + "0" * 64: "is not made",
        copied(served, good, "1" * 64, base="f" * 64): "belongs to base ffffffffffff",
        copied(served, good, "2" * 64, rank=128): "at most 64",
    }
    for state, words in cases.items():
        with pytest.raises(InputError, match=words):
            engine.generate([ask(state)])
    options = {
        "between 1": {"rank": 0},
        "at most 64": {"rank": 65},
        "error must lie": {"error": 1.5},
        "either a rank": {"rank": 8, "error": 0.1},
        "loses": {"error": 1e-9},
        "'swap' or 'lora'": {"as_": "prompt"},
        "are for LoRAs": {"as_": "swap", "rank": 8},
    }
    for words, given in options.items():
        with pytest.raises(InputError, match=words):
            served.weights("norms=1", **{"as_": "lora", **given})
    assert engine.generate([ask(good)])[0].lora.rank == 64


def test_a_lora_that_is_not_whole_in_the_engine_is_not_used(served):
    engine = served.engine()
    state = copied(served, served.weights("tuned=1", **FULL), "3" * 64)
    path = folder_of(served, state) / WEIGHTS
    factors = load_file(path)
    first = min(key for key in factors if "lora_B" in key)
    save_file({k: v * (k != first) for k, v in factors.items()}, path, {"format": "pt"})
    with pytest.raises(EngineFailed, match="holds 27 modules"):
        engine.generate([ask(state)])


def test_a_folder_that_is_gone_is_told_and_the_engine_lives(served):
    engine = served.engine()
    state = copied(served, served.weights("other=1", **FULL), "4" * 64)
    assert engine.generate([ask(state)])[0].lora.rank == 64
    shutil.rmtree(folder_of(served, state))
    with pytest.raises(InputError, match="is not made"):
        engine.generate([ask(state)])
    where = served.access()
    body = {"model": "4" * 64, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    reply = httpx.post(
        where["url"] + "/v1/chat/completions",
        json=body,
        headers={"authorization": f"Bearer {where['token']}"},
        timeout=60,
        trust_env=False,
    )
    assert reply.status_code == 400 and "no longer on the disk" in reply.text
    assert reply.headers[HEADER] == "base"
    assert engine.generate([ask()])[0].text


# -- on the disk --------------------------------------------------------------------------------


def test_the_error_is_that_of_the_factors_on_the_disk(served):
    base = load_file(served.model().folder / "model.safetensors")
    tuned = load_file(served.home.weights / served.weights("norms=1") / "model.safetensors")
    errors = []
    for rank in (4, 16, 64):
        folder = folder_of(served, served.weights("norms=1", "lora", rank=rank))
        merged = read_lora(folder, {key: value.double() for key, value in base.items()})
        whole = lost = 0.0
        for key, value in tuned.items():
            delta = value.double() - base[key].double()
            got = merged[key].double() - base[key].double() if key in merged else 0.0
            whole += float(delta.square().sum())
            lost += float((delta - got).square().sum())
        errors.append(math.sqrt(lost / whole))
        stated = LoraFile.model_validate_json((folder / FILE).read_bytes())
        assert stated.error == pytest.approx(errors[-1], rel=1e-4)
        assert set(stated.left_out) == {key for key in tuned if "norm" in key}
        assert all(stated.errors[key] == 1 for key in stated.left_out)
    assert errors[0] > errors[1] > errors[2] > 0, "the norms are lost at every rank"


def test_a_second_use_does_nothing_and_an_error_chooses_the_rank(served):
    state = served.weights("tuned=1", "lora", error=0.5)
    folder = folder_of(served, state)
    stated = LoraFile.model_validate_json((folder / FILE).read_bytes())
    assert stated.error <= 0.5 and 1 < stated.rank < 64
    before = (folder / WEIGHTS).stat()
    assert served.weights("tuned=1.0", "lora", error=0.5) == state
    after = (folder / WEIGHTS).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    others = {served.weights("tuned=1", "lora"), served.weights("tuned=2", "lora", error=0.5)}
    assert state not in others and len(others) == 2
    assert served.weights("", "lora") == served.weights("tuned=0", "lora") == "base"
