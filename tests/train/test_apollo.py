"""Reference, property and contract tests of APOLLO, its rounding and its state."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from vectors.errors import InputError
from workbench.train.apollo import Apollo
from workbench.train.projection import projection
from workbench.train.rounding import counted_noise, stochastic_round

TALL, WIDE = (24, 10), (10, 24)


def gradients(shape: tuple[int, ...], steps: int, seed: int = 0) -> list[Tensor]:
    """Noise of a size that jumps about, so that the limiter has something to do."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [1.0, 0.1, 3.0, 3.0, 0.5]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64) * sizes[t % 5]
        for t in range(steps)
    ]


def reference(w: Tensor, grads: list[Tensor], *, r, mini, alpha, gap, gamma, lr, wd, seed, compat):
    """The algorithm as the paper and the public code have it, one channel at a time, in float64."""
    b1, b2, eps = 0.9, 0.999, 1e-8
    w = w.clone()
    turned = w.shape[0] < w.shape[1]
    small = min(w.shape)
    m = v = before = 0.0
    for t, gradient in enumerate(grads, 1):
        g = gradient.T if turned else gradient
        p = projection(r, small, seed, (t - 1) // gap, g.device, g.dtype).T / math.sqrt(r)
        R = torch.stack([p @ channel for channel in g])
        m = b1 * m + (1 - b1) * R
        v = b2 * v + (1 - b2) * R**2
        if compat:
            Q = m / (v**0.5 + eps)
        else:
            Q = (m / (1 - b1**t)) / ((v / (1 - b2**t)) ** 0.5 + eps)
        if mini:
            s = [Q.norm() / (R.norm() + 1e-8)] * len(g)
        else:
            s = [q.norm() / (x.norm() + 1e-8) for q, x in zip(Q, R, strict=True)]
        u = torch.stack([channel * factor for channel, factor in zip(g, s, strict=True)])
        if not compat:
            u = u * alpha
        if t > 1 and gamma is not None:
            u = u / (max(u.norm().item() / (before + 1e-8), gamma) / gamma)
        before = u.norm().item()
        u = u.T if turned else u
        if compat:
            w = w - lr * math.sqrt(1 - b2**t) / (1 - b1**t) * alpha * u
            w = w - lr * wd * w
        else:
            w = w * (1 - lr * wd) - lr * u
    return w


def run(w: Tensor, grads: list[Tensor], **options) -> tuple[Tensor, Apollo]:
    parameter = nn.Parameter(w.clone())
    optimizer = Apollo([parameter], **options)
    for gradient in grads:
        parameter.grad = gradient.to(w.dtype)
        optimizer.step()
    return parameter.detach(), optimizer


@pytest.mark.parametrize("compat", [None, "apollo-torch"])
@pytest.mark.parametrize("gamma", [1.01, None])
@pytest.mark.parametrize("scaling", ["channel", "tensor"])
@pytest.mark.parametrize("shape", [TALL, WIDE, (10, 10)])
def test_equals_the_reference_in_float64(shape, scaling, gamma, compat):
    start = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    grads = gradients(shape, 9)
    mini = scaling == "tensor"
    r = 1 if mini else 4
    ours, _ = run(
        start,
        grads,
        lr=0.01,
        rank=r,
        scaling=scaling,
        refresh=3,
        limiter=gamma,
        weight_decay=0.1,
        seed=7,
        compat=compat,
    )
    theirs = reference(
        start,
        grads,
        r=r,
        mini=mini,
        alpha=math.sqrt(10 / r),
        gap=3,
        gamma=gamma,
        lr=0.01,
        wd=0.1,
        seed=7,
        compat=compat,
    )
    # The limiter takes ||U|| from channel norms, and alpha inside or outside of it meets the 1e-8.
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shape", [(7,), (6, 4), (8, 1, 4)])
def test_vectors_and_small_matrices_take_adamw(shape):
    start, grads = torch.ones(shape, dtype=torch.float64), gradients(shape, 5)
    ours, _ = run(start, grads, lr=0.01, rank=4, weight_decay=0.1)
    parameter = nn.Parameter(start.clone())
    adamw = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0.1)
    for gradient in grads:
        parameter.grad = gradient
        adamw.step()
    torch.testing.assert_close(ours, parameter.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rank", [8, 32])
@pytest.mark.parametrize("shape", [(96, 200), (200, 96)])
def test_alpha_gives_adamws_step_size(shape, rank):
    grads = [torch.randn(shape, generator=torch.Generator().manual_seed(t)) for t in range(12)]
    start = torch.zeros(shape)
    sizes = {}
    for name, options in (("auto", {"rank": rank}), ("adamw", {"rank": 1000})):
        few, _ = run(start, grads[:-1], lr=1.0, limiter=None, **options)
        all_, _ = run(start, grads, lr=1.0, limiter=None, **options)
        sizes[name] = (all_ - few).norm().item()
    # A norm in R dimensions varies from channel to channel, and E[1 / ||x||^2] = R / (R - 2).
    wanted = sizes["adamw"] * math.sqrt(rank / (rank - 2))
    assert sizes["auto"] == pytest.approx(wanted, rel=0.06)
    plain, _ = run(start, grads[:1], lr=1.0, rank=rank, scale=1.0)
    auto, _ = run(start, grads[:1], lr=1.0, rank=rank)
    torch.testing.assert_close(auto, plain * math.sqrt(96 / rank))


def test_limiter_holds_growth():
    parameter = nn.Parameter(torch.zeros(TALL))
    optimizer = Apollo([parameter], lr=1.0, rank=4)
    norms = []
    for gradient in gradients(TALL, 10):
        before = parameter.detach().clone()
        parameter.grad = gradient.float()
        optimizer.step()
        norms.append((parameter.detach() - before).norm().item())
    growth = [b / a for a, b in pairwise(norms)]
    assert max(growth) == pytest.approx(1.01, rel=1e-4)


def test_a_step_without_gradient_does_not_stop_the_matrix():
    one = torch.randn(TALL, generator=torch.Generator().manual_seed(0))
    moved, _ = run(torch.zeros(TALL), [one, torch.zeros(TALL), one], lr=1.0, rank=4)
    first, _ = run(torch.zeros(TALL), [one], lr=1.0, rank=4)
    assert (moved - first).norm() > 0.1 * first.norm()


def test_projection_is_new_after_refresh_and_the_same_for_one_seed():
    make = lambda *key: projection(4, 10, *key, torch.device("cpu"), torch.float64)  # noqa: E731
    assert torch.equal(make(1, 2), make(1, 2))
    assert not torch.equal(make(1, 2), make(1, 3))
    assert not torch.equal(make(1, 2), make(2, 2))
    longer = projection(4, 30, 1, 2, torch.device("cpu"), torch.float64)
    assert torch.equal(make(1, 2), longer[:10])
    draws = torch.stack([make(i, 0) for i in range(500)])
    assert set(draws.unique().tolist()) == {-1.0, 1.0}
    # Signs of different places and seeds are independent: 1 on the diagonal and noise elsewhere.
    flat = draws.view(500, 40)
    close = flat.T @ flat / 500 - torch.eye(40, dtype=torch.float64)
    assert close.abs().max() < 5 / math.sqrt(500)


def test_projection_keeps_lengths():
    x = torch.randn(50, 600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    P_SR = projection(64, 600, 0, 0, torch.device("cpu"), torch.float64) / 8
    ratios = ((x @ P_SR).norm(dim=1) / x.norm(dim=1)).square()
    assert ratios.mean().item() == pytest.approx(1, abs=4 * math.sqrt(2 / 64 / 50))
    assert ratios.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.5)


def wells(counter: int, key: int, turn: int) -> int:
    """The mixing function with Python's own numbers."""
    full = 0xFFFFFFFF
    x = (counter + key) & full
    x ^= x >> 17
    x = x * 0xED5AD4BB & full
    x ^= x >> 11
    x = (x + turn) * 0xAC4C1B51 & full
    x ^= x >> 15
    x = x * 0x31848BAB & full
    return x ^ (x >> 14)


@pytest.mark.parametrize("shape", [(1, 9), (5, 3), (64, 2), (65, 3), (130, 3), (200, 1)])
def test_noise_of_an_element_is_a_function_of_its_place(shape):
    key, turn = -123456789, 987654321
    noise = counted_noise(shape, key, torch.tensor(turn, dtype=torch.int32))
    assert noise.shape == shape
    for i in range(shape[0]):
        for j in range(shape[1]):
            group, row = divmod(i, 128)
            word = wells((64 * group + row % 64) * shape[1] + j, key & 0xFFFFFFFF, turn)
            assert noise[i, j] == (word >> 16 if row >= 64 else word & 0xFFFF)


def test_noise_is_uniform_and_independent_from_step_to_step():
    draws = [counted_noise((256, 64), 5, torch.tensor(t, dtype=torch.int32)) for t in range(40)]
    flat = torch.stack(draws).double().view(40, -1) / 65536
    counts = torch.histc(flat, 64, 0, 1)
    expected = flat.numel() / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * math.sqrt(126)
    # Means over the steps of one element, in units of what independent numbers would give.
    assert (flat.mean(0).std() / math.sqrt(1 / 12 / 40)).item() == pytest.approx(1, abs=0.05)
    neighbours = torch.corrcoef(torch.stack([flat[:-1].flatten(), flat[1:].flatten()]))[0, 1]
    assert abs(neighbours) < 5 / math.sqrt(flat.numel())


def test_stochastic_rounding_is_unbiased_and_keeps_special_values():
    value = torch.full((200_000,), 1.0 + 0.3 / 128)
    rounded = stochastic_round(value, torch.Generator().manual_seed(0)).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 1 / 128}
    assert (rounded.mean() - 1).item() * 128 == pytest.approx(0.3, abs=0.01)
    down = stochastic_round(-value, torch.Generator().manual_seed(1)).float()
    assert (down.mean() + 1).item() * 128 == pytest.approx(-0.3, abs=0.01)
    special = torch.tensor([0.0, 0.5, -2.0, math.inf, -math.inf, math.nan])
    kept = stochastic_round(special, torch.Generator().manual_seed(0)).float()
    torch.testing.assert_close(kept, special, equal_nan=True, rtol=0, atol=0)
    with pytest.raises(InputError, match="float32"):
        stochastic_round(special.double())


@pytest.mark.parametrize("rank", [4, 64])
def test_small_updates_move_bfloat16_weights_on_average(rank):
    shape, steps, lr = (64, 48), 40, 1e-5
    start = torch.full(shape, 0.02, dtype=torch.bfloat16)
    constant = [torch.ones(shape)] * steps
    ours, optimizer = run(start, constant, lr=lr, rank=rank)
    exact, _ = run(start.float(), constant, lr=lr, rank=rank)
    nearest = (start.float() - lr).bfloat16()
    assert torch.equal(nearest, start), "one update is lost by rounding to nearest"
    moved = (ours.float() - start.float()).mean().item()
    assert moved == pytest.approx((exact - start.float()).mean().item(), rel=0.1)
    state = optimizer.state_dict()["state"][0]
    assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_exactly_through_a_file_without_pickle(dtype, tmp_path):
    shapes = [TALL, WIDE, (6,)]
    steps = [[g.to(dtype) for g in (gradients(s, 8, seed=i))] for i, s in enumerate(shapes)]

    def fresh() -> tuple[list[nn.Parameter], Apollo]:
        parameters = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
        return parameters, Apollo(parameters, lr=1e-2, rank=4, refresh=3, seed=11)

    def go(parameters, optimizer, begin, end):
        for t in range(begin, end):
            for parameter, grads in zip(parameters, steps, strict=True):
                parameter.grad = grads[t].clone()
            optimizer.step()

    whole, optimizer = fresh()
    go(whole, optimizer, 0, 8)
    first, optimizer = fresh()
    go(first, optimizer, 0, 4)
    torch.save(optimizer.state_dict(), tmp_path / "state")
    second = [nn.Parameter(parameter.detach().clone()) for parameter in first]
    resumed = Apollo(second, lr=1.0, rank=4)
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    go(second, resumed, 4, 8)
    for a, b in zip(whole, second, strict=True):
        assert torch.equal(a, b)
    assert all(s["exp_avg"].dtype == torch.float32 for s in resumed.state.values())


def test_calls_can_be_replayed_with_the_numbers_of_later_steps():
    """As a captured graph does, which reads the same places again."""
    moved = []
    for replay in (False, True):
        parameters = [nn.Parameter(torch.ones(shape)) for shape in (TALL, WIDE, (6,))]
        for i, parameter in enumerate(parameters):
            parameter.grad = gradients(tuple(parameter.shape), 1, seed=i)[0].float()
        optimizer = Apollo(parameters, lr=1e-2, rank=4, refresh=1, weight_decay=0.1)
        calls = optimizer.prepare()
        for t in range(3):
            if t:
                optimizer.param_groups[0]["lr"] /= 2
                later = optimizer.prepare()
                calls = calls if replay else later
            for call in calls:
                call()
        moved.append(parameters)
    for a, b in zip(*moved, strict=True):
        assert torch.equal(a, b)


def test_groups_can_be_added_and_have_their_own_projections():
    first, second = (nn.Parameter(torch.zeros(TALL)) for _ in range(2))
    optimizer = Apollo([first], lr=1.0, rank=4)
    optimizer.add_param_group({"params": [second], "rank": 2})
    assert [group["rank"] for group in optimizer.param_groups] == [4, 2]
    assert [group["first"] for group in optimizer.param_groups] == [0, 1]
    gradient = gradients(TALL, 1)[0].float()
    first.grad, second.grad = gradient, gradient.clone()
    loss = optimizer.step(lambda: torch.tensor(3.0))
    assert loss.item() == 3.0
    assert first.detach().norm() > 0 and second.detach().norm() > 0
    assert not torch.equal(first, second)
    assert optimizer.state[second]["exp_avg"].shape == (24, 2)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"lr": math.nan},
        {"rank": 0},
        {"scaling": "row"},
        {"scale": 0.0},
        {"refresh": 0},
        {"limiter": 0.5},
        {"betas": (1.0, 0.9)},
        {"eps": 0.0},
        {"weight_decay": -1.0},
        {"compat": "galore"},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        Apollo([nn.Parameter(torch.zeros(3, 3))], **options)


def test_float16_weights_are_refused():
    with pytest.raises(InputError, match="float16"):
        Apollo([nn.Parameter(torch.zeros(3, 3, dtype=torch.float16))])
