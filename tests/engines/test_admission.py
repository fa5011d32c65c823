"""Requests that wait for a row: nobody is let in too early, nobody waits for ever."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from tests_support.toys import VECTORS, make

from vectors.types import Phase
from workbench.engines.vllm.admission import Admission, _add_request, _free_request, _schedule
from workbench.engines.vllm.spec import STEER, Injection, Resolved


def text(*terms):
    return Resolved(tuple(sorted(Injection(v, 0, 1.0, Phase(p), o) for v, p, o in terms))).to_json()


class Scheduler:
    """What the wrappers need of vLLM's scheduler."""

    def __init__(self, adding, projecting):
        self.workbench_admission = Admission(adding, projecting)
        self.waiting: list[str] = []

    def add_request(self, request):
        _add_request(self, lambda s, r: s.waiting.append(r.request_id), request)

    def schedule(self):
        _schedule(self, lambda s: None)
        entered, self.waiting = self.waiting, []
        return entered

    def end(self, name):
        _free_request(self, lambda s, r: None, SimpleNamespace(request_id=name))


def request(name, steer):
    params = SimpleNamespace(extra_args={STEER: steer} if steer else None)
    return SimpleNamespace(request_id=name, sampling_params=params)


def test_requests_wait_for_a_row_in_their_order():
    s = Scheduler(2, 1)
    for name, steer in {
        "one": text(("a", "all", "add")),
        "two": text(("b", "all", "add")),
        "plain": None,
        "three": text(("c", "all", "add")),
        "same": text(("a", "all", "add")),
    }.items():
        s.add_request(request(name, steer))
    assert s.schedule() == ["one", "two", "plain"]
    s.end("plain")
    assert s.schedule() == []
    s.end("two")
    assert s.schedule() == ["three", "same"]
    s.add_request(request("turn", text(("a", "all", "turn"))))
    s.add_request(request("both", text(("d", "prompt", "add"), ("e", "decode", "add"))))
    assert s.schedule() == ["turn"]
    s.end("three")
    assert s.schedule() == []
    s.end("one")
    assert s.schedule() == []
    s.end("same")
    assert s.schedule() == ["both"]


def test_cancelled_while_it_waits():
    s = Scheduler(2, 0)
    for name in "abc":
        s.add_request(request(name, text((name, "all", "add"))))
    s.workbench_admission.drop(["c", "unknown"])
    s.end("a")
    assert s.schedule() == ["a", "b"]


def test_what_no_front_end_resolved_is_left_to_the_worker():
    assert Admission(2, 0).admit("r", "cheerful=0.2")


@pytest.mark.parametrize("seed", range(3))
def test_a_worker_never_runs_out_of_rows(seed):
    """Random lives through both: whatever is admitted, the bank has a row for."""
    generator = np.random.default_rng(seed)
    _, steering = make(rows=7, projecting=3, slots=50)
    s = Scheduler(4, 2)
    running: list[str] = []
    entered = 0
    for number in range(600):
        phase = ["all", "prompt", "decode"][generator.integers(3)]
        operator = ["add", "add", "ablate"][generator.integers(3)]
        steer = text((list(VECTORS)[generator.integers(8)], phase, operator))
        s.add_request(request(f"r{number}", steer))
        texts = {f"r{number}": steer}
        s.texts = getattr(s, "texts", {}) | texts
        for name in s.schedule():
            steering.add(name, {STEER: s.texts[name]}, 3, 0)
            assert not steering._live[name][1].problem
            running.append(name)
            entered += 1
        while running and generator.random() < 0.6:
            name = running.pop(int(generator.integers(len(running))))
            s.end(name)
            steering.remove(name)
    while running:
        for name in running:
            s.end(name)
            steering.remove(name)
        running = s.schedule()
        entered += len(running)
        for name in running:
            steering.add(name, {STEER: s.texts[name]}, 3, 0)
    assert entered == 600 and steering.bank.used == 0
