"""The whole of training on tiny models: it learns, measures, stops, goes on, and refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import workbench.train
from vectors.errors import Cancelled, InputError, PromptTooLong, RunFailed, ShapeMismatch
from workbench.train import Decision, Lesson, SoftTargets, StepRecord, TrainConfig, targets, train
from workbench.train.sgd import RoundedSgd

PUSH = 2.0 * torch.randn(64, generator=torch.Generator().manual_seed(1))


def decisions(count: int = 9, replay: int = 3, seed: int = 0) -> list[Decision]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for line in range(count + replay):
        p, t = 3 + line % 5, 1 + line % 4
        ids = torch.randint(0, 128, (p + t,), generator=generator).tolist()
        kind = "steered" if line < count else "replay"
        found.append(Decision(tuple(ids[:p]), tuple(ids[p:]), kind, line))
    return found


def settings(**given) -> TrainConfig:
    return TrainConfig(**{"learning_rate": 2e-3, "rank": 8, "batch": 3, "passes": 6, **given})


@pytest.mark.parametrize("loss", ["soft", "tokens"])
@pytest.mark.parametrize(("tier", "optimizer"), [(2, "apollo"), (1, "adamw"), (3, "sgd")])
def test_the_loss_falls_and_the_ends_stay(model, tier, optimizer, loss):
    items = decisions()
    soft = targets(model, items, {1: PUSH}) if loss == "soft" else None
    rate = 0.3 if optimizer == "sgd" else 2e-3
    config = settings(tier=tier, optimizer=optimizer, loss=loss, learning_rate=rate)
    embedding = model.get_input_embeddings().weight.detach().clone()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    flags = [p.requires_grad for p in model.parameters()]
    records: list[StepRecord] = []
    result = train(model, items, soft, config, Lesson(items, soft), records.append)
    assert result.before and result.after
    assert result.after.steered < 0.9 * result.before.steered
    assert [r.step for r in records] == list(range(1, 19)) and result.steps == 18
    assert records[0].learning_rate == rate > records[-1].learning_rate > 0
    assert all(r.grad_norm > 0 and r.seconds > 0 and r.tokens > 0 for r in records)
    assert [r.step for r in records if r.held_out] == [10]
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert torch.equal(model.get_output_embeddings().weight, embedding)
    state = model.state_dict()
    assert result.weights.keys() == start.keys() - {"model.embed_tokens.weight"}
    for name, tensor in result.weights.items():
        assert torch.equal(tensor, state[name])
        assert not torch.equal(tensor, start[name]), name
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


def test_replay_is_learnt_from_the_base_and_starts_at_nothing(llama):
    items = decisions()
    lesson = Lesson(items, targets(llama, items, {1: PUSH}, k=128))
    result = train(llama, items, lesson.targets, settings(passes=1), lesson)
    assert result.before and result.before.general == pytest.approx(0, abs=1e-5)
    assert result.before.steered is not None and result.before.steered > 0.01
    only_steered = decisions(replay=0)
    result = train(llama, only_steered, None, settings(loss="tokens", replay=0.0, passes=1))
    assert result.before is None and result.after is None


@pytest.mark.parametrize("optimizer", ["apollo", "adamw", "sgd"])
def test_bfloat16_weights_learn(llama, optimizer):
    items = decisions()
    soft = targets(llama, items, {1: PUSH})
    llama.bfloat16()
    rate = {"learning_rate": 0.3} if optimizer == "sgd" else {}
    config = settings(passes=10, optimizer=optimizer, **rate)
    result = train(llama, items, soft, config, Lesson(items, soft))
    assert result.before and result.after
    assert result.after.steered < 0.9 * result.before.steered


def test_descent_in_bfloat16_moves_by_the_gradient_on_average():
    moved = []
    for seed in (1, 1, 2):
        weight = torch.nn.Parameter(torch.ones(400, 500, dtype=torch.bfloat16))
        optimizer = RoundedSgd([weight], 2**-11, seed)
        for _ in range(2):
            weight.grad = -torch.ones_like(weight)
            optimizer.step()
        moved.append(weight.detach().double() - 1)
    assert torch.equal(moved[0], moved[1]) and not torch.equal(moved[0], moved[2])
    # Two steps of a sixteenth of the spacing; 200,000 sums of two coins: five standard errors.
    assert moved[0].mean().item() == pytest.approx(2**-10, rel=5 * (15 / 4e5) ** 0.5)


def test_descent_leaves_other_types_unrounded():
    weights = [
        torch.nn.Parameter(torch.full((3,), 1.001, dtype=t))
        for t in (torch.float32, torch.bfloat16)
    ]
    optimizer = RoundedSgd(weights, 0.5)
    for weight in weights:
        weight.grad = torch.full_like(weight, 2**-12)
    optimizer.step()
    assert torch.equal(weights[0], torch.full((3,), 1.001) - 2**-13)
    assert weights[1].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [
        ("apollo", torch.float32),
        ("adamw", torch.float32),
        ("sgd", torch.float32),
        ("sgd", torch.bfloat16),
    ],
)
def test_resume_gives_the_same_weights_bit_for_bit(model, optimizer, dtype, tmp_path):
    model.to(dtype)
    items = decisions()
    soft = targets(model, items, {1: PUSH})
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    config = settings(passes=2, optimizer=optimizer, checkpoint_every=3)
    whole = train(model, items, soft, config, Lesson(items, soft))
    expected = {name: tensor.clone() for name, tensor in whole.weights.items()}

    def again() -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(start[name])

    again()
    path, seen = tmp_path / "state.safetensors", []
    stop = lambda: len(seen) == 4  # noqa: E731
    with pytest.raises(Cancelled, match="after step 4 of 6"):
        train(model, items, soft, config, Lesson(items, soft), seen.append, stop, path)
    assert sorted(f.name for f in tmp_path.iterdir()) == [path.name]
    again()
    later: list[StepRecord] = []
    rest = train(model, items, soft, config, Lesson(items, soft), later.append, checkpoint=path)
    assert [r.step for r in later] == [4, 5, 6]
    assert rest.before == whole.before and rest.after == whole.after
    for name, tensor in rest.weights.items():
        assert torch.equal(tensor, expected[name]), name
    done = train(model, items, soft, config, checkpoint=path)
    assert torch.equal(done.weights["model.norm.weight"], expected["model.norm.weight"])


def test_checkpoints_of_other_runs_and_damaged_ones_are_refused(llama, tmp_path):
    items = decisions()
    path = tmp_path / "state.safetensors"
    config = settings(loss="tokens", checkpoint_every=1, passes=1)
    train(llama, items, None, config, checkpoint=path)
    with pytest.raises(InputError, match="another model, other decisions or other settings"):
        train(llama, items, None, config.model_copy(update={"seed": 5}), checkpoint=path)
    with pytest.raises(InputError, match="another model"):
        train(llama, decisions(seed=4), None, config, checkpoint=path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be read"):
        train(llama, items, None, config, checkpoint=path)


def test_a_loss_that_is_not_finite_ends_the_run(llama):
    items = decisions()
    with torch.no_grad():
        llama.model.norm.weight.fill_(torch.inf)
    before = llama.model.layers[0].mlp.up_proj.weight.detach().clone()
    with pytest.raises(RunFailed, match="lower the learning rate"):
        train(llama, items, None, settings(loss="tokens"))
    assert torch.equal(llama.model.layers[0].mlp.up_proj.weight, before)
    assert all(p.grad is None for p in llama.parameters())


def test_bad_input_is_refused(llama):
    items = decisions()
    soft = targets(llama, items, {})
    with pytest.raises(InputError, match="needs the teacher's targets"):
        train(llama, items, None, settings())
    with pytest.raises(ShapeMismatch, match="lengths"):
        train(llama, items, soft[:-1], settings())
    with pytest.raises(ShapeMismatch, match="lengths"):
        train(llama, items, soft[::-1], settings())
    with pytest.raises(PromptTooLong, match="line 77"):
        train(llama, [*items, Decision((1,) * 90, (2,) * 7, line=77)], None, settings())


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0},
        {"learning_rate": float("nan")},
        {"optimizer": "lion"},
        {"rank": 0},
        {"replay": 1.0},
        {"tier": 4},
        {"keep": "first"},
        {"reuse": "cloud"},
        {"patience": -1},
        {"batch": 0},
        {"clip": -1},
        {"seed": -1},
        {"speed": 1},
    ],
)
def test_wrong_settings_are_refused_by_name(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        TrainConfig.parse(wrong)
    with pytest.raises(ValidationError):
        TrainConfig(**wrong)


@given(st.integers(1, 200))
def test_the_rate_falls_linearly_and_never_to_nothing(steps):
    config = TrainConfig()
    rates = [config.rate_at(step, steps) for step in range(1, steps + 1)]
    assert rates[0] == config.learning_rate and rates[-1] > 0
    assert rates == sorted(rates, reverse=True)
    assert TrainConfig(schedule="constant").rate_at(steps, steps) == config.learning_rate


def test_importing_the_package_costs_no_torch():
    code = "import sys, workbench.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_exported_name_is_there():
    for name in workbench.train.__all__:
        assert getattr(workbench.train, name) is not None
    assert SoftTargets is workbench.train.SoftTargets
    with pytest.raises(AttributeError):
        workbench.train.nothing  # noqa: B018
