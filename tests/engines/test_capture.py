"""Capturing in the worker, without vLLM: toy layers of both kinds, against hooks and plain sums."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load
from tests_support.toys import BLOCKS, KINDS, VECTORS, WIDTH, make

from vectors.errors import BlockNotFound, GrammarError, SteeringNotApplied
from vectors.types import Phase
from workbench.engines.vllm.capture import captures as captures_module
from workbench.engines.vllm.capture.spec import (
    CAPTURE,
    CAPTURE_ID,
    FOLLOW_ID,
    PROJECT,
    Wanted,
    capture_id,
    parse_capture,
)
from workbench.engines.vllm.capture.trace import OWN_BYTES
from workbench.engines.vllm.selftest import SelfTest
from workbench.engines.vllm.spec import STEER, Injection, Resolved

STEERED = Resolved((Injection("a", 1, 1.5, Phase.ALL),)).to_json()


def ask(positions, name, steer=""):
    return {CAPTURE: positions, CAPTURE_ID: name, **({STEER: steer} if steer else {})}


def streams_of(toy, h_TD):
    """The residual stream behind every block, `[L, T, D]`, by hooks."""
    found = []

    def read(module, inputs, output):
        both = (output,) if isinstance(output, torch.Tensor) else output
        found.append(sum(both).double())

    hooks = [layer.register_forward_hook(read) for layer in toy.layers]
    toy(h_TD)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


class Batches:
    """Runs steps as a runner would, from the host or from the device, and remembers what passed."""

    def __init__(self, kinds="whole", *, host=True, **more):
        self.toy, self.steering = make(kinds, **more)
        self.host = host
        self.seen = {}
        self.generator = torch.Generator().manual_seed(0)

    def step(self, runs):
        """`runs` maps a request to its first position and how many run."""
        starts_N = np.array([start for start, _ in runs.values()])
        counts_N = np.array([count for _, count in runs.values()])
        slots_N = self.steering.slots(list(runs))
        tokens = int(counts_N.sum())
        places = [(r, s + i) for r, (s, c) in runs.items() for i in range(c)]
        if self.host:
            self.steering.place(slots_N, starts_N, counts_N)
        else:
            positions = torch.tensor([position for _, position in places])
            first_N1 = torch.tensor([0, *np.cumsum(counts_N)])
            self.steering.expand(
                positions, first_N1, torch.from_numpy(slots_N), len(runs), tokens + 2
            )
        self.steering.ran(slots_N, starts_N, counts_N)
        # A token is what its request and position make it, whenever it runs.
        h_TD = torch.stack([self.token(*place) for place in places])
        if not self.host:
            h_TD = torch.cat([h_TD, torch.full((2, WIDTH), float("nan"))])  # padding
        for place, stream_LD in zip(places, streams_of(self.toy, h_TD).unbind(1), strict=False):
            self.seen[place] = stream_LD

    def token(self, request, position):
        seed = 1000 * sum(map(ord, request)) + position
        return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))

    def take(self, *names):
        return self.steering.captures.take(names)

    def wanted(self, request, positions):
        return torch.stack([self.seen[request, p] for p in positions], 1)


def check(batches, name, request, positions, blocks=slice(None)):
    data, problem = batches.take(name)
    assert not problem
    found = load(data)
    wanted_LTD = batches.wanted(request, positions)[blocks]
    assert int(found[f"{name}.count"]) == len(positions)
    torch.testing.assert_close(found[f"{name}.mean"], wanted_LTD.mean(1).float())
    torch.testing.assert_close(found[f"{name}.norm"], wanted_LTD.norm(dim=-1).mean(1).float())


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("host", [False, True])
def test_each_request_gets_its_own_mean_in_chunks_and_beside_others(kinds, eager, host):
    b = Batches(kinds, host=host, eager=eager)
    b.steering.captures.table.sum_LRD.fill_(float("nan"))  # what an earlier request left
    b.steering.captures.table.norm_LR.fill_(float("nan"))
    b.steering.add("plain", {}, 6, 0)
    b.steering.add("span", ask("2-5", "one"), 9, 0)
    b.steering.add("last", ask("last:1-2", "two", STEERED), 4, 0)
    b.steering.add("decode", ask("decode", "three"), 3, 0)
    b.step({"plain": (0, 4), "span": (0, 4), "decode": (0, 3)})
    b.step({"span": (4, 3), "last": (0, 4), "plain": (4, 2), "decode": (3, 1)})
    b.step({"decode": (4, 1), "span": (7, 2), "last": (4, 1)})
    check(b, "one", "span", range(2, 6))
    for request in ("plain", "span", "last", "decode"):
        b.steering.remove(request)
    check(b, "two", "last", [3], slice(1, 3))
    check(b, "three", "decode", [3, 4])
    assert b.steering.captures.idle or b.steering.captures._written
    assert "fetched before" in b.take("one")[1]


def test_a_steered_request_is_captured_behind_the_edit():
    b = Batches()
    b.steering.add("r", ask("0-3", "one", STEERED), 4, 0)
    b.steering.add("p", ask("0-3", "two"), 4, 0)
    b.step({"r": (0, 4), "p": (0, 4)})
    steered_LTD = b.wanted("r", range(4))
    plain_LTD = streams_of(Batches().toy, torch.stack([b.token("r", p) for p in range(4)]))
    torch.testing.assert_close(steered_LTD[0], plain_LTD[0])
    assert ((steered_LTD[1:] - plain_LTD[1:]).norm(dim=-1) > 0.5).all()
    check(b, "one", "r", range(4))
    check(b, "two", "p", range(4))


def test_a_preempted_request_that_keeps_its_slot_adds_each_position_once():
    b = Batches()
    b.steering.add("r", ask("1-6", "one"), 8, 0)
    b.step({"r": (0, 5)})
    b.step({"r": (0, 3)})
    b.step({"r": (3, 5)})
    check(b, "one", "r", range(1, 7))


def test_a_preempted_request_that_comes_anew_begins_its_sums_again():
    b = Batches(host=False)
    b.steering.add("r", ask("1-6", "one"), 8, 0, slot=2)
    b.step({"r": (0, 5)})
    b.steering.remove("r")
    b.steering.add("r", ask("1-6", "one"), 8, 0, slot=4)
    b.step({"r": (0, 8)})
    b.steering.remove("r")
    check(b, "one", "r", range(1, 7))


def test_a_slot_begins_with_sums_at_zero_for_the_next_request():
    b = Batches(slots=1)
    for name in ("a", "b"):
        b.steering.add(name, ask("0-1", name), 2, 0)
        b.step({name: (0, 2)})
        b.steering.remove(name)
    check(b, "b", "b", range(2))
    check(b, "a", "a", range(2))


def test_nobody_captures_and_nothing_is_added():
    b = Batches(eager=True)
    b.steering.add("r", {}, 4, 0)
    b.step({"r": (0, 4)})
    assert not b.steering.captures.table.sum_LRD.any()
    assert b.steering.idle


def test_what_is_incomplete_or_came_from_a_cache_is_not_given_out():
    b = Batches()
    b.steering.add("r", ask("0-3", "one"), 4, 2)
    b.step({"r": (2, 2)})
    assert "2 of 4 positions" in b.take("one")[1]
    b.steering.add("d", ask("decode", "two"), 2, 0)
    b.step({"d": (0, 2)})
    assert "at least 2 tokens" in b.take("two")[1]
    assert b.take("nobody") == (
        b"",
        "Nothing is captured under 'nobody': it is unknown, was fetched before, or has expired.",
    )


def test_an_id_serves_one_request():
    b = Batches()
    b.steering.add("r", ask("0-1", "one"), 2, 0)
    b.steering.add("s", ask("0-1", "one"), 2, 0)
    assert "belongs to another request" in b.steering.refused.pop("s")
    b.step({"r": (0, 2), "s": (0, 2)})
    check(b, "one", "r", range(2))
    b.steering.add("t", ask("0-9", "three"), 2, 0)
    assert "positions 0 to 1" in b.steering.refused["t"]
    assert "positions 0 to 1" in b.take("three")[1]


@pytest.mark.parametrize("what", ["sums", "projection"])
def test_an_id_serves_the_next_request_when_the_first_has_ended(what):
    b = Batches()
    extra = ask("decode", "one") if what == "sums" else project("one")
    for number, request in enumerate(("r", "s", "t")):
        b.steering.add(request, extra, 2, 0)
        assert not b.steering.refused
        b.step({request: (0, 2)})
        for position in range(2, 4 + number):
            b.step({request: (position, 1)})
        b.steering.remove(request)
    captures = b.steering.captures
    assert list(captures._kept) == ["one"] and captures._bytes == captures._kept["one"].kept_bytes
    if what == "sums":
        check(b, "one", "t", range(2, 6))
    else:
        found = load(b.take("one")[0])["one.projection"]
        torch.testing.assert_close(found, projections(b, "one", "t", range(2, 6)))
    assert captures._bytes == 0


def test_why_a_projection_was_refused_is_told_by_the_fetch():
    b = Batches()
    b.steering.add("r", project("one"), 2, 0)
    b.steering.add("s", project("one"), 2, 0)
    assert "still runs" in b.steering.refused.pop("s")
    b.step({"r": (0, 2), "s": (0, 2)})
    b.step({"r": (2, 1), "s": (2, 1)})
    assert not b.take("one")[1]
    assert "still runs" in b.take("one")[1]
    b.steering.add("t", project("two", 9), 2, 0)
    assert "has 3 blocks" in b.steering.refused["t"]
    assert "has 3 blocks" in b.take("two")[1]
    b.steering._agree = lambda problem: problem or "It is not in the other's library."
    b.steering.add("u", project("three"), 2, 0)
    assert "the other's library" in b.take("three")[1]


def test_a_refusal_is_forgotten_when_its_id_serves_a_request():
    b = Batches()
    b.steering.add("r", ask("0-9", "one"), 2, 0)
    b.steering.remove("r")
    b.steering.add("s", ask("0-1", "one"), 2, 0)
    b.step({"s": (0, 2)})
    check(b, "one", "s", range(2))
    assert "fetched before" in b.take("one")[1]


def test_what_nobody_fetches_expires(monkeypatch):
    monkeypatch.setattr(captures_module, "KEPT_BYTES", 3 * BLOCKS * (WIDTH + 1) * 4)
    b = Batches()
    for name in "abcdefg":
        b.steering.add(name, ask("0", name), 1, 0)
        b.step({name: (0, 1)})
        b.steering.remove(name)
    assert [bool(b.take(name)[1]) for name in "abcdefg"] == [True] * 4 + [False] * 3
    assert b.steering.captures._bytes == 0


def test_random_lives_leave_nothing_behind():
    b = Batches("split", slots=4)
    generator = np.random.default_rng(0)
    for number in range(60):
        name, length = f"r{number}", int(generator.integers(1, 6))
        last = int(generator.integers(0, length))
        b.steering.add(name, ask(f"{last}", name), length, 0)
        if generator.random() < 0.8:
            b.step({name: (0, length)})
            if generator.random() < 0.5:
                check(b, name, name, [last])
        b.steering.remove(name)
    captures = b.steering.captures
    assert not captures._running and not captures._slots_S4.any()


def test_a_compiler_takes_the_sums_into_its_graph():
    b = Batches("split")
    compiled = torch.compile(b.toy, backend="aot_eager", fullgraph=True, dynamic=True)
    h_TD = torch.randn(4, WIDTH)
    compiled(h_TD)
    b.steering.add("r", ask("1-3", "one"), 4, 0)
    slots_N = b.steering.slots(["r"])
    for start, count in ((0, 2), (2, 2)):
        b.steering.place(slots_N, np.array([start]), np.array([count]))
        compiled(h_TD[start : start + count])
        b.steering.ran(slots_N, np.array([start]), np.array([count]))
    found = load(b.take("one")[0])["one.mean"]
    b.steering.remove("r")
    torch.testing.assert_close(found, streams_of(b.toy, h_TD)[:, 1:].mean(1).float())


# -- projections of tokens ----------------------------------------------------------------------


def project(name, block=1):
    """`name` is the client's id; the server has a name of its own for it."""
    return {PROJECT: f"a:{block}", CAPTURE_ID: name, FOLLOW_ID: f"{name} of the server"}


def known(batches, since, ended=()):
    """What is known of the projections, by the client's ids."""
    ours = {f"{name} of the server": first for name, first in since.items()}
    found = batches.steering.captures.projections(ours, [f"{name} of the server" for name in ended])
    return {name.removesuffix(" of the server"): told for name, told in found.items()}


def projections(batches, name, request, positions, block=1):
    vector = VECTORS["a"]
    h_TD = batches.wanted(request, positions)[block]
    return (h_TD @ vector.directions[block].double() / vector.mean_norms[block]).float()


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("ended", [False, True])
def test_each_generated_position_is_projected(host, ended):
    b = Batches("split", host=host, eager=host)
    b.steering.add("r", project("one"), 3, 0)
    b.steering.add("p", {}, 3, 0)
    b.step({"r": (0, 2), "p": (0, 3)})
    b.step({"p": (3, 1), "r": (2, 1)})
    b.step({"r": (3, 1), "p": (4, 1)})
    b.step({"p": (5, 1)})
    b.step({"r": (4, 1), "p": (6, 1)})
    b.step({"r": (5, 1)})
    if ended:
        b.steering.remove("r")
    data, problem = b.take("one")
    assert not problem
    wanted_T = projections(b, "one", "r", [3, 4, 5])
    torch.testing.assert_close(load(data)["one.projection"], wanted_T)
    b.steering.remove("r")
    assert not b.steering.captures._running and not b.steering.captures._slots_S4.any()


def test_a_reply_of_one_token_has_no_projection():
    b = Batches()
    b.steering.add("r", project("one"), 3, 0)
    b.step({"r": (0, 3)})
    assert load(b.take("one")[0])["one.projection"].shape == (0,)


@pytest.mark.parametrize("host", [False, True])
def test_a_traced_request_that_was_preempted_goes_on_behind_what_was_noted(host):
    b = Batches(host=host)
    slots = {} if host else {"slot": 1}
    b.steering.add("r", project("one"), 2, 0, **slots)
    for step in ((0, 2), (2, 1), (3, 1)):
        b.step({"r": step})
    if not host:
        # This runner hears of it, and begins the request anew in another slot.
        b.steering.remove("r")
        b.steering.add("r", project("one"), 2, 0, slot=3)
    b.step({"r": (0, 3)})
    b.step({"r": (3, 2)})
    b.step({"r": (5, 1)})
    found, problem = known(b, {"one": 1}, ["one"])["one"]
    wanted_T = projections(b, "one", "r", [2, 3, 4, 5])
    assert not problem
    torch.testing.assert_close(torch.tensor(found), wanted_T[1:])
    b.steering.remove("r")
    torch.testing.assert_close(load(b.take("one")[0])["one.projection"], wanted_T)


def test_positions_that_ran_together_cannot_be_told_apart():
    b = Batches(host=False)
    b.steering.add("r", project("one"), 2, 0)
    for step in ((0, 2), (2, 1)):
        b.step({"r": step})
    b.steering.remove("r")
    b.steering.add("r", project("one"), 2, 0)
    b.step({"r": (0, 5)})
    b.step({"r": (5, 1)})
    found, problem = known(b, {"one": 0})["one"]
    torch.testing.assert_close(torch.tensor(found), projections(b, "one", "r", [2]))
    assert "preempted" in problem and "preempted" in b.take("one")[1]


def test_projections_are_there_while_the_request_runs_and_are_not_taken():
    b = Batches("split", eager=True)
    b.steering.add("r", project("one"), 3, 0)
    b.steering.add("s", project("two", 2), 2, 0)
    b.step({"r": (0, 3), "s": (0, 2)})
    read = partial(known, b)
    assert read({"one": 0, "two": 0, "nobody": 0}, ["nobody"]) == {"one": ([], ""), "two": ([], "")}
    wanted = {"one": [], "two": []}
    for n in range(4):
        b.step({"s": (2 + n, 1), "r": (3 + n, 1)})
        found = read({"one": n, "two": 0}, [])
        for name, request, first, block in (("one", "r", 3, 1), ("two", "s", 2, 2)):
            wanted[name] = projections(b, name, request, range(first, first + n + 1), block)
        torch.testing.assert_close(torch.tensor(found["one"][0]), wanted["one"][n:])
        torch.testing.assert_close(torch.tensor(found["two"][0]), wanted["two"])
    b.steering.remove("r")
    assert read({"one": 0}, ["one"])["one"][0] == read({"one": 0}, [])["one"][0]
    data, problem = b.take("one", "two")
    assert not problem
    for name, wanted_T in wanted.items():
        torch.testing.assert_close(load(data)[f"{name}.projection"], wanted_T)
    assert read({"one": 0}, []) == {}


def test_what_its_client_left_is_forgotten():
    b = Batches()
    for name in ("kept", "running", "fetched"):
        b.steering.add(name, project(name), 2, 0)
    b.step(dict.fromkeys(("kept", "running", "fetched"), (0, 2)))
    b.step(dict.fromkeys(("kept", "running", "fetched"), (2, 1)))
    b.steering.remove("kept")
    b.steering.captures.forget([f"{name} of the server" for name in ("kept", "running", "nobody")])
    b.step({"running": (3, 1), "fetched": (3, 1)})
    for name in ("running", "fetched"):
        b.steering.remove(name)
    captures = b.steering.captures
    assert list(captures._kept) == ["fetched"] and captures._bytes > 0
    assert list(captures._followed) == ["fetched of the server"]
    assert "unknown" in b.take("running")[1]
    torch.testing.assert_close(
        load(b.take("fetched")[0])["fetched.projection"],
        projections(b, "fetched", "fetched", [2, 3]),
    )
    assert captures._bytes == 0 and not captures._running and not captures._traces._at
    assert not captures._followed


def test_projections_that_nobody_fetches_expire(monkeypatch):
    monkeypatch.setattr(captures_module, "KEPT_BYTES", 3 * (OWN_BYTES + 4 * 2))
    b = Batches()
    for name in "abcdefg":
        b.steering.add(name, project(name), 1, 0)
        for position in range(3):
            b.step({name: (position, 1)})
        b.steering.remove(name)
    assert [bool(b.take(name)[1]) for name in "abcdefg"] == [True] * 4 + [False] * 3
    assert b.steering.captures._bytes == 0


# -- the self-test ------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["missing", "twice", "norm"])
def test_the_selftest_finds_sums_that_are_wrong(wrong):
    toy, steering = make("split")
    layer, sums = toy.layers[1], steering.captures.table
    if wrong == "missing":
        layer.workbench_sum_RD = torch.zeros_like(layer.workbench_sum_RD)
    elif wrong == "twice":
        layer.workbench_sum_RD = sums.sum_LRD[2]
    else:
        layer.workbench_norm_R = torch.zeros_like(layer.workbench_norm_R)

    def run(tokens):
        steering.rest()
        return toy(torch.ones(tokens, WIDTH))

    with pytest.raises(SteeringNotApplied, match="what was captured"):
        SelfTest(toy, toy.layers, steering, run, {"compiled": run}, 8).run()


# -- the grammar --------------------------------------------------------------------------------

spans = st.tuples(st.integers(0, 999), st.integers(0, 999)).map(sorted).map(tuple)


@given(
    st.one_of(
        spans.map(lambda s: Wanted(*s)),
        st.just(Wanted(-1, -1)),
        st.just(Wanted(-1, -1, decode=True)),
    ),
    st.one_of(st.none(), spans),
)
def test_the_grammar_comes_back(wanted, blocks):
    if blocks is not None:
        wanted = Wanted(wanted.first, wanted.last, wanted.decode, *blocks)
    assert parse_capture(str(wanted)) == wanted


@given(st.text(max_size=12))
def test_any_other_text_is_refused_in_a_sentence(text):
    try:
        parse_capture(text)
    except GrammarError as error:
        assert str(error).endswith(".")


@pytest.mark.parametrize(
    "text", ["", "5-2", "-1", "1-", "first", "3:", "3:5-2", "٣", "1,2", 7, None]
)
def test_what_is_not_of_the_grammar(text):
    with pytest.raises(GrammarError):
        parse_capture(text)


def test_positions_are_made_definite_and_checked():
    assert str(parse_capture("last:2").within(9)) == "8:2-2"
    assert str(parse_capture("decode").within(9)) == "decode"
    with pytest.raises(GrammarError, match="positions 0 to 8"):
        parse_capture("3-9").within(9)
    with pytest.raises(BlockNotFound, match="blocks 0 to 2"):
        parse_capture("last:1-3").check_blocks(3)
    for given_id in ("", "a b", "ä", "x" * 65, 3, None):
        with pytest.raises(GrammarError, match="capture_id"):
            capture_id({CAPTURE_ID: given_id})
