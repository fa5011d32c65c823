"""The worker's part without vLLM: toy layers of both kinds, every token checked against the reference."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests_support.toys import BLOCKS, KINDS, TOKENS, VECTORS, WIDTH, make
from torch import nn

from vectors.errors import BackendUnavailable, ModelNotSupported, SteeringNotApplied
from vectors.steering.operators import apply_edit, combine, edit_of
from vectors.types import Phase
from workbench.engines.vllm import edit, receipts
from workbench.engines.vllm.edit import EditTable
from workbench.engines.vllm.receipts import ENDED_KEPT
from workbench.engines.vllm.selftest import SelfTest
from workbench.engines.vllm.spec import STEER, STEER_ID, Injection, Resolved


def steer(*terms, start=0):
    found = [Injection(v, b, d, Phase(p), o) for v, b, d, p, o in terms]
    return Resolved(tuple(sorted(found)), start).to_json()


def naive(toy, h_TD, edits_TB):
    """Each token alone, layer after layer, in plain PyTorch."""
    out = []
    for h_D, edits in zip(h_TD, edits_TB, strict=True):
        h = h_D[None]
        for block, layer in enumerate(toy.layers):
            h = h + torch.tanh(layer.mlp(h))
            if edits.get(block):
                h = apply_edit(h, combine(edits[block]))
        out.append(h[0])
    return torch.stack(out)


REQUESTS = {
    "plain": None,
    "add": steer(("a", 1, 0.5, "all", "add"), ("b", 1, -1.0, "all", "add")),
    "phases": steer(("a", 0, 1.0, "prompt", "add"), ("b", 2, 1.0, "decode", "add")),
    "ablate": steer(("c", 2, 1.0, "all", "ablate"), ("d", 0, 0.3, "decode", "add")),
    "late": steer(("e", 1, 1.0, "all", "turn"), start=2),
}


def expected(text, position, length):
    if text is None:
        return {}
    resolved = Resolved.from_json(text)
    if position < resolved.start:
        return {}
    edits = {}
    for i in resolved.at(Phase.PROMPT if position < length else Phase.DECODE):
        made = edit_of(i.operator, VECTORS[i.vector].directions[i.block], 2.0, i.dose)
        edits.setdefault(i.block, []).append(made)
    return edits


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("host", [False, True])
def test_every_token_of_a_mixed_batch_gets_its_own_edit(kinds, eager, host):
    toy, steering = make(kinds, eager=eager)
    lengths, starts, counts = [4, 3, 3, 2, 5], [0, 2, 1, 3, 0], [4, 3, 2, 1, 5]
    for (name, text), length in zip(REQUESTS.items(), lengths, strict=True):
        steering.add(name, {STEER: text} if text else {}, length, 0)
    slots_N = steering.slots(list(REQUESTS))
    tokens = sum(counts)
    positions = [s + i for s, c in zip(starts, counts, strict=True) for i in range(c)]
    if host:
        steering.place(slots_N, np.array(starts), np.array(counts))
    else:
        first_N1 = torch.tensor([0, *np.cumsum(counts)])
        steering.expand(
            torch.tensor(positions), first_N1, torch.from_numpy(slots_N), len(counts), tokens + 3
        )
    h_TD = torch.randn(tokens, WIDTH)
    whose = [n for n, c in zip(range(5), counts, strict=True) for _ in range(c)]
    texts = list(REQUESTS.values())
    edits = [expected(texts[n], p, lengths[n]) for n, p in zip(whose, positions, strict=True)]
    torch.testing.assert_close(toy(h_TD), naive(toy, h_TD, edits), rtol=1e-5, atol=1e-5)
    assert not steering.table.row_of_token_T[tokens:].any()


@pytest.mark.parametrize("kinds", KINDS)
def test_a_compiler_takes_the_edit_into_its_graph(kinds):
    toy, steering = make(kinds)
    compiled = torch.compile(toy, backend="aot_eager", fullgraph=True, dynamic=True)
    h_TD = torch.randn(4, WIDTH)
    torch.testing.assert_close(compiled(h_TD), toy(h_TD))
    plain_TD = toy(h_TD)
    # What was compiled while nobody steered must steer, and for other batch sizes too.
    steering.add("r", {STEER: REQUESTS["ablate"]}, 2, 0)
    steering.place(steering.slots(["r"]), np.array([0]), np.array([4]))
    steered_TD = compiled(h_TD)
    assert (steered_TD - plain_TD).abs().max() > 0.1
    torch.testing.assert_close(steered_TD, toy(h_TD))
    more_TD = torch.randn(7, WIDTH)
    torch.testing.assert_close(compiled(more_TD), toy(more_TD))


def test_when_the_last_steered_request_has_gone_nothing_is_steered():
    toy, steering = make()
    h_TD = torch.randn(4, WIDTH)
    plain_TD = toy(h_TD)
    steering.add("r", {STEER: REQUESTS["add"]}, 2, 0)
    steering.add("p", {}, 2, 0)
    both = steering.slots(["r", "p"])
    steering.place(both, np.array([0, 0]), np.array([2, 2]))
    assert not torch.equal(toy(h_TD)[:2], plain_TD[:2])
    assert torch.equal(toy(h_TD)[2:], plain_TD[2:])
    steering.remove("r")
    steering.place(steering.slots(["p"]), np.array([2]), np.array([1]))
    assert torch.equal(toy(h_TD), plain_TD) and steering.idle


class Life:
    """A request that runs: its slot, its prompt, where it is, and how far it has ever come."""

    def __init__(self, name: str, text: str | None, slot: int, length: int) -> None:
        self.name, self.slot, self.length = name, slot, length
        self.extra = {STEER: text, STEER_ID: name} if text else {}
        self.position = self.furthest = 0
        self.told = not text

    def ran(self, steering) -> dict[str, int]:
        """How many positions of each phase its rows have steered."""
        prompt, decode, end, begin = map(int, steering._slots_S4[self.slot])
        return {
            "prompt": bool(prompt) * max(0, min(self.furthest, end) - begin),
            "decode": bool(decode) * max(0, self.furthest - max(end, begin)),
        }

    def check(self, steering, wanted: dict[str, int]) -> bool:
        """Its receipt says so; whether it was asked for the first time, and is of anything."""
        if self.told:
            return False
        self.told = True  # a receipt is taken once
        receipt = steering.receipt(self.name)
        assert {phase: receipt[phase] for phase in wanted} == wanted
        return receipt["least"] > 0


@pytest.mark.parametrize("host", [False, True])
def test_steps_that_repeat_the_last_one_cost_nothing_and_are_never_wrong(host):
    """Random steps of requests that come, go and go back, in chunks and any part of them at a time.

    Each step has the rows that a fresh look would give it, and each request leaves a receipt of all
    that it ran, or of what it had run when the receipt was asked for.
    """
    draw = random.Random(0)
    _, steering = make(slots=4)
    looked = []
    way = "_fill" if host else "_expand"
    original = getattr(steering, way)
    setattr(steering, way, lambda *a: (looked.append(a), original(*a)))
    lives: list[Life] = []
    steps = receipts = 0
    for turn in range(4000):
        chance = draw.random()
        free = [s for s in range(4) if s not in [life.slot for life in lives]]
        if lives and chance < 0.05:  # one leaves, and half the time another takes its place at once
            old = lives.pop(draw.randrange(len(lives)))
            wanted = old.ran(steering)
            if draw.random() < 0.2:
                receipts += old.check(steering, wanted)
            steering.remove(old.name)
            receipts += old.check(steering, wanted)
            free = [old.slot] if chance < 0.025 else []
        elif lives and chance < 0.07:  # one is preempted, and goes on where something is cached
            back = draw.choice(lives)
            back.position = draw.randrange(back.position + 1)
            if host:
                steering.look_again()
            else:
                steering.remove(back.name)
                steering.add(back.name, back.extra, back.length, back.position, back.slot)
        elif lives and chance < 0.08:
            asked = draw.choice(lives)
            receipts += asked.check(steering, asked.ran(steering))
        elif chance > 0.99:
            steering.rest()
            assert not steering.table.row_of_token_T.any()
        if free and (len(free) == 1 or chance > 0.94):
            text = draw.choice(list(REQUESTS.values()))
            life = Life(f"r{turn}", text, free[0], draw.randrange(1, 6))
            lives.append(life)
            steering.add(life.name, life.extra, life.length, 0, life.slot)
        if not lives:
            continue
        part = draw.randrange(1, len(lives) + 1)
        running = lives[:] if draw.random() < 0.9 else draw.sample(lives, part)
        counts = [max(1, draw.randint(1, max(1, x.length - x.position))) for x in running]
        slots_N = np.array([life.slot for life in running])
        starts_N, counts_N = np.array([life.position for life in running]), np.array(counts)
        positions = [x.position + i for x, c in zip(running, counts, strict=True) for i in range(c)]
        first_N1 = torch.tensor([0, *np.cumsum(counts)])
        decoding = (slots_N, starts_N) if sum(counts) == len(counts) else None
        tokens = sum(counts) + (draw.random() < 0.05)
        steps += 1
        if host:
            steering.place(slots_N, starts_N, counts_N)
        else:
            steering.expand(
                torch.tensor(positions),
                first_N1,
                torch.from_numpy(slots_N),
                len(counts),
                tokens,
                decoding,
            )
        steering.ran(slots_N, starts_N, counts_N)
        true_T = torch.zeros_like(steering.table.row_of_token_T)
        whose = np.repeat(slots_N, counts)
        for t, (slot, p) in enumerate(zip(whose, positions, strict=True)):
            prompt, decode, end, begin = steering._slots_S4[slot]
            true_T[t] = 0 if p < begin else int(prompt if p < end else decode)
        assert torch.equal(steering.table.row_of_token_T, true_T), turn
        for life, count in zip(running, counts, strict=True):
            life.position += count
            life.furthest = max(life.furthest, life.position)
    assert steps > 3000 and len(looked) < 0.7 * steps and receipts > 50


def test_a_receipt_counts_what_ran_before_a_step_that_left_its_request_out():
    _, steering = make()
    for slot, name in enumerate(("one", "two", "late")):
        extra = {STEER: REQUESTS["add"], STEER_ID: name}
        steering.add(name, extra, 1 + 4 * (name == "late"), 0, slot)
    both_N, one_N = np.array([0, 1]), np.ones(2, dtype=np.int64)
    for turn in range(5):
        steering.place(both_N, np.full(2, turn), one_N)
        steering.ran(both_N, np.full(2, turn), one_N)
    mixed_N, at_N, counts_N = np.array([0, 2]), np.array([5, 0]), np.array([1, 4])
    steering.place(mixed_N, at_N, counts_N)
    steering.ran(mixed_N, at_N, counts_N)
    told = {name: steering.receipt(name) for name in ("one", "two", "late")}
    assert [(r["prompt"], r["decode"]) for r in told.values()] == [(1, 5), (1, 4), (4, 0)]


def test_a_receipt_counts_nothing_of_an_unsteered_request_that_had_the_slot_before():
    _, steering = make()
    steering.add("other", {STEER: REQUESTS["add"]}, 1, 0, 0)
    steering.add("plain", {}, 1, 0, 1)
    slots_N, one_N = np.array([0, 1]), np.ones(2, dtype=np.int64)
    for turn in range(3):
        at_N = np.array([1 + turn, 10 + turn])
        steering.place(slots_N, at_N, one_N)
        steering.ran(slots_N, at_N, one_N)
    steering.remove("plain")
    steering.add("next", {STEER: REQUESTS["add"], STEER_ID: "id"}, 2, 0, 1)
    steering.place(slots_N, np.array([4, 0]), one_N)
    steering.ran(slots_N, np.array([4, 0]), one_N)
    steering.remove("next")
    receipt = steering.receipt("id")
    assert (receipt["prompt"], receipt["decode"]) == (1, 0)


def test_rows_are_shared_reused_and_never_short_of_reason():
    _, steering = make(rows=5, projecting=2, slots=9)
    bank = steering.bank
    keys = {v: (Injection(v, 0, 1.0, Phase.ALL),) for v in VECTORS}
    rows = {v: bank.acquire(keys[v]) for v in "abc"}
    assert len(set(rows.values())) == 3 and bank.loaded == 3
    assert bank.acquire(keys["a"]) == rows["a"] and bank.loaded == 3
    with pytest.raises(BackendUnavailable, match="All 3 rows"):
        bank.acquire(keys["d"])
    bank.release(rows["a"])
    with pytest.raises(BackendUnavailable, match="All 3 rows"):
        bank.acquire(keys["d"])
    bank.release(rows["a"])
    assert bank.acquire(keys["d"]) == rows["a"]
    wanted_D = VECTORS["d"].addition(0, 1.0)
    torch.testing.assert_close(steering.table.add_LRD[0, rows["a"]], wanted_D)
    assert bank.used == 3


def test_a_row_that_is_replaced_keeps_nothing_of_what_it_held():
    _, steering = make(rows=2, projecting=2)
    bank, table = steering.bank, steering.table
    row = bank.acquire((Injection("a", 0, 1.0, Phase.ALL, "turn"),))
    bank.release(row)
    assert bank.acquire((Injection("b", 2, 1.0, Phase.ALL, "clamp"),)) == row
    assert not table.add_LRD[:2, row].any() and not table.keep_LP[:, row].any()
    torch.testing.assert_close(table.add_LRD[2, row], VECTORS["b"].addition(2, 1.0))
    bank.release(row)
    assert bank.acquire((Injection("c", 0, 1.0, Phase.ALL, "turn"),)) == row
    assert not table.read_LPD[:, row].any() and not table.write_LPD[:, row].any()
    assert table.keep_LP[:, row].tolist() == [1, 0, 0]


def test_an_eager_engine_knows_at_which_blocks_any_row_acts():
    _, steering = make(rows=9, projecting=4, eager=True)
    bank, draw = steering.bank, random.Random(0)
    held: list[tuple[int, tuple[Injection, ...]]] = []
    for _ in range(300):
        if held and (len(held) == 3 or draw.random() < 0.5):
            bank.release(held.pop(draw.randrange(len(held)))[0])
        else:
            operator = draw.choice(["add", "ablate"])
            blocks = draw.sample(range(BLOCKS), draw.randint(1, BLOCKS))
            key = tuple(Injection(draw.choice("ab"), b, 1.0, Phase.ALL, operator) for b in blocks)
            held.append((bank.acquire(key), key))
        wanted: dict[int, bool] = {}
        for _, key in held:
            for i in key:
                wanted[i.block] = wanted.get(i.block, False) or i.operator != "add"
        assert steering.table.live == wanted


def test_random_lives_leak_no_row():
    _, steering = make(rows=13, slots=6)
    generator = np.random.default_rng(0)
    running: list[str] = []
    for number in range(400):
        if running and (len(running) == 6 or generator.random() < 0.5):
            steering.remove(running.pop(int(generator.integers(len(running)))))
        name = "abcdefgh"[int(generator.integers(8))]
        phase = ["all", "prompt", "decode"][int(generator.integers(3))]
        request = f"r{number}"
        steering.add(request, {STEER: steer((name, 0, 1.0, phase, "add"))}, 3, 0)
        running.append(request)
        assert steering.bank.used <= 2 * len(running)
    for request in running:
        steering.remove(request)
    assert steering.bank.used == 0 and not steering._slots_S4.any() and not steering._live


def test_receipts_count_positions_once_over_preemption_and_cache():
    _, steering = make()
    extra = {STEER: REQUESTS["phases"], STEER_ID: "one"}
    steering.add("r", extra, 4, 1)
    slots_N = steering.slots(["r"])
    for start, count in ((1, 2), (3, 1), (4, 1), (5, 1)):
        steering.place(slots_N, np.array([start]), np.array([count]))
        steering.ran(slots_N, np.array([start]), np.array([count]))
    steering.remove("r")
    steering.add("r", extra, 4, 2)
    slots_N = steering.slots(["r"])
    steering.ran(slots_N, np.array([2]), np.array([5]))
    wanted = {"requests": 1, "prompt": 3, "decode": 3, "cached": 1, "rows": 1, "least": 7}
    assert steering.receipt("one") == {**wanted, "problem": "", "declined": 0, "projection": None}
    assert steering.receipt("one")["requests"] == 0


def test_an_id_keeps_no_more_of_many_requests_than_their_sums():
    _, steering = make()
    many = 3 * ENDED_KEPT
    long = {STEER: REQUESTS["phases"], STEER_ID: "many"}
    steering.add("long", long, 4, 0)
    for number in range(many):
        request = f"r{number}"
        steering.add(request, long, 4, 1 if number < 5 else 0)
        # A few come less far than the others, and are the first to be summed.
        end = 4 if number < 5 else 6
        steering.ran(steering.slots([request]), np.array([0]), np.array([end]))
        steering.remove(request)
    steering.ran(steering.slots(["long"]), np.array([0]), np.array([9]))
    kept = steering._receipts.under("many")
    assert len(kept._ended) == ENDED_KEPT and len(kept._running) == 1
    receipt = steering.receipt("many")
    assert receipt["requests"] == many + 1 and receipt["least"] == 4
    assert receipt["prompt"] == 4 * (many + 1) - 5 and receipt["cached"] == 5
    assert receipt["decode"] == 2 * (many - 5) + 5
    assert steering.receipt("many")["requests"] == 0


def test_what_is_asked_for_an_unknown_id_forgets_no_other(monkeypatch):
    monkeypatch.setattr(receipts, "IDS_KEPT", 2)
    _, steering = make()
    for name in ("one", "two", "three"):
        steering.add(name, {STEER: REQUESTS["add"], STEER_ID: name}, 4, 0)
    assert steering.receipt("nobody")["requests"] == 0
    assert [steering.receipt(n)["requests"] for n in ("one", "two", "three")] == [0, 1, 1]


def test_a_vector_that_cannot_be_used_is_told_by_the_receipt():
    _, steering = make()
    steering.add("r", {STEER: steer(("a", 7, 1.0, "all", "add")), STEER_ID: "x"}, 4, 0)
    steering.place(steering.slots(["r"]), np.array([0]), np.array([4]))
    receipt = steering.receipt("x")
    assert "has 3 blocks" in receipt["problem"] and receipt["least"] == 0
    assert steering.bank.used == 0


def test_more_requests_than_slots_each_keep_their_own():
    """A preempted request keeps its slot, so that more are begun than can run at once."""
    _, steering = make("split", rows=80)
    slots = len(steering._slots_S4)
    names = [f"r{n}" for n in range(3 * slots)]
    for n, name in enumerate(names):
        doses = 0.25 + n / 64
        steering.add(name, {STEER: steer(("a", 1, doses, "all", "add"))} if n % 2 else None, 4, 0)
    assert len(set(steering.slots(names).tolist())) == len(names)
    for n, name in enumerate(names):
        row = int(steering._slots_S4[steering.slots([name])[0], 0])
        added_D = steering.table.add_LRD[1, row]
        wanted_D = VECTORS["a"].directions[1] * 2.0 * (0.25 + n / 64) * (n % 2)
        assert torch.allclose(added_D, wanted_D, atol=1e-6)
    for name in names:
        steering.remove(name)
    assert steering.bank.used == 0
    assert sorted(steering._free) == list(range(len(steering._slots_S4)))


def test_what_hinders_another_worker_hinders_this_one():
    _, steering = make("split")
    steering._agree = lambda problem: problem or "It is not in the other's library."
    text = steer(("a", 1, 1.0, "all", "add"))
    steering.add("r", {STEER: text, STEER_ID: "x"}, 4, 0)
    assert steering.refused == {"r": "It is not in the other's library."}
    assert steering.bank.used == 0
    assert steering.receipt("x")["problem"]


def test_drafts_that_the_host_cannot_follow_are_refused_at_start():
    from workbench.engines.vllm.runner_v1 import _load_model

    with pytest.raises(ModelNotSupported, match="--no-async-scheduling"):
        _load_model(SimpleNamespace(use_async_spec_decode=True), lambda runner: None)


def test_layers_that_return_something_else_are_refused():
    class Odd(nn.Module):
        def forward(self, h):
            return h, h, h

    table = EditTable.make(1, 2, 4, 4, dtype=torch.float32, device=torch.device("cpu"))
    layer = Odd()
    edit.attach([layer], table)
    with pytest.raises(ModelNotSupported, match="Odd cannot be steered"):
        layer(torch.zeros(2, 4))


# -- the self-test ------------------------------------------------------------------------------


def selftest_of(toy, steering, other=None):
    def run(tokens):
        steering.rest()
        return toy(torch.ones(tokens, WIDTH))

    return SelfTest(toy, toy.layers, steering, run, {"compiled": other or run}, TOKENS)


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("rows", [2, 3, 9])
def test_the_selftest_passes_what_is_right_and_leaves_nothing_behind(kinds, rows):
    toy, steering = make(kinds, rows=rows, projecting=2)
    report = selftest_of(toy, steering).run()
    assert report.blocks == BLOCKS and report.stream_error < 1e-4
    assert report.path_errors["compiled"] < 1e-6
    assert not steering.table.add_LRD.any() and not steering.table.row_of_token_T.any()


def test_the_selftest_finds_a_path_without_the_edit():
    toy, steering = make()

    def unsteered(tokens):
        steering.table.row_of_token_T.zero_()
        return toy(torch.ones(tokens, WIDTH))

    with pytest.raises(SteeringNotApplied, match="block 0 on the path 'compiled'"):
        selftest_of(toy, steering, unsteered).run()


def test_the_selftest_finds_a_layer_that_adds_twice():
    toy, steering = make()
    twice = toy.layers[1]
    twice.register_forward_hook(lambda m, i, out: edit._edit(m, out))
    with pytest.raises(SteeringNotApplied, match="block 1 "):
        selftest_of(toy, steering).run()


def test_the_selftest_finds_a_layer_without_the_edit():
    toy, steering = make()
    toy.layers[2].workbench_add_RD = None
    with pytest.raises(SteeringNotApplied, match="block 2 "):
        selftest_of(toy, steering).run()


def test_a_recorded_path_may_see_other_tokens_but_not_capture_something_else():
    toy, steering = make()

    def recorded(tokens):
        """What comes in differs, as it does where attention reads a dummy batch's cache."""
        steering.rest()
        return toy(torch.ones(tokens, WIDTH) + torch.randn(tokens, WIDTH))

    def unread(tokens):
        hidden_TD = recorded(tokens)
        steering.captures.table.sum_LRD[1] *= 2
        return hidden_TD

    assert selftest_of(toy, steering, recorded).run().path_errors["compiled"] > 1e-4
    with pytest.raises(SteeringNotApplied, match="block 1 on the path 'compiled': what was captu"):
        selftest_of(toy, steering, unread).run()
