"""Conditional steering: the prompt decides, once, whether what follows is steered."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests_support.toys import VECTORS, WIDTH, make

from vectors.types import Phase
from workbench.engines.vllm.spec import STEER, STEER_ID, Condition, Injection, Resolved

STEPS = ((0, 3), (3, 2), (5, 1), (6, 1))  # the prompt in two chunks, then two tokens
LENGTH = 5


def asked(threshold, *, above=True, block=0):
    condition = Condition("b", block, threshold, above)
    injections = (Injection("a", 1, 1.5, Phase.DECODE),)
    return {STEER: Resolved(injections, 0, condition).to_json(), STEER_ID: "receipt"}


class Run:
    """One request beside an unsteered one, as a runner runs them."""

    def __init__(self, extra, *, host=True, **more):
        self.toy, self.steering = make("split", **more)
        self.host, self.extra = host, extra
        self.h_TD = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))
        self.steering.add("other", {}, LENGTH, 0)
        self.steering.add("r", extra, LENGTH, 0)

    def steps(self, steps=STEPS):
        """The last block's stream of the request's tokens."""
        return torch.cat([self.step(*step) for step in steps])

    def step(self, start, count):
        slots_N = self.steering.slots(["other", "r"])
        starts_N, counts_N = np.array([start, start]), np.array([count, count])
        if self.host:
            self.steering.place(slots_N, starts_N, counts_N)
        else:
            positions_T = torch.arange(start, start + count).repeat(2)
            first_N1 = torch.tensor([0, count, 2 * count])
            self.steering.expand(positions_T, first_N1, torch.from_numpy(slots_N), 2, 2 * count)
        out = self.toy(self.h_TD[start : start + count].repeat(2, 1))
        self.steering.ran(slots_N, starts_N, counts_N)
        return out[count:] if isinstance(out, torch.Tensor) else sum(out)[count:]

    def projection(self):
        """`sum(h . v) / sum(|h|)` behind block 0 of the unsteered prompt, in float64."""
        toy, _ = make("split")
        found = []
        hook = toy.layers[0].register_forward_hook(lambda m, i, o: found.append(sum(o).double()))
        toy(self.h_TD[:LENGTH])
        hook.remove()
        v_D = VECTORS["b"].directions[0].double()
        return float((found[0] @ v_D).sum() / found[0].norm(dim=-1).sum())


def plain():
    return Run({}).steps()


def always():
    steered = Resolved((Injection("a", 1, 1.5, Phase.DECODE),)).to_json()
    return Run({STEER: steered}).steps()


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize("met", [False, True])
def test_the_prompt_decides(met, above, host, eager):
    projection = Run({}).projection()
    threshold = projection + (-0.01 if met == above else 0.01)
    run = Run(asked(threshold, above=above), host=host, eager=eager)
    torch.testing.assert_close(run.steps(), always() if met else plain())
    receipt = run.steering.receipt("receipt")
    assert receipt["projection"] == pytest.approx(projection, abs=1e-5)
    assert receipt["declined"] == (not met) and receipt["decode"] == 2 * met
    assert not receipt["problem"] and receipt["prompt"] == 0
    run.steering.remove("r")
    run.steering.remove("other")
    assert not run.steering.bank.used and not run.steering._slots_S4.any()
    assert not run.steering.captures._running


def test_steering_is_seen_at_all():
    assert not torch.allclose(plain()[LENGTH:], always()[LENGTH:])
    torch.testing.assert_close(plain()[:LENGTH], always()[:LENGTH])


@pytest.mark.parametrize("again", [True, False])
def test_a_preempted_request_is_decided_once(again):
    """Whether it comes anew, or keeps its slot and runs from its first position."""
    run = Run(asked(Run({}).projection() - 0.01))
    run.steps(STEPS[:3])
    if again:
        run.steering.remove("r")
        run.steering.add("r", run.extra, LENGTH, 0)
    torch.testing.assert_close(run.steps(((0, 6), (6, 1))), always())


def test_a_request_that_is_preempted_in_its_prompt_is_decided_by_all_of_it():
    projection = Run({}).projection()
    run = Run(asked(projection - 0.01))
    run.step(0, 3)
    run.steering.remove("r")
    run.steering.add("r", run.extra, LENGTH, 0)
    torch.testing.assert_close(run.steps(), always())
    assert run.steering.receipt("receipt")["projection"] == pytest.approx(projection, abs=1e-5)


def test_a_prompt_out_of_a_cache_is_refused():
    _, steering = make("split")
    steering.add("r", asked(0.0), LENGTH, 2)
    assert "2 positions of the prompt came from a cache" in steering.refused["r"]
    assert not steering.bank.used


def test_an_engine_without_capture_refuses():
    _, steering = make("split")
    steering.captures = None
    steering._conditions._captures = None
    steering.add("r", asked(0.0), LENGTH, 0)
    assert "--capture" in steering.refused["r"]
