"""Early stop, best and last, and kill -9 at any moment: the weights at the end are the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vectors.errors import Cancelled
from workbench.train import Decision, Lesson, TrainConfig, train
from workbench.train.best import Best
from workbench.train.held_out import HeldOutLoss


def decisions(seed: int = 0) -> list[Decision]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 128, (6, 9), generator=generator).tolist()
    return [Decision(tuple(row[:5]), tuple(row[5:]), line=i) for i, row in enumerate(rows)]


def settings(**given) -> TrainConfig:
    base = {"learning_rate": 2e-3, "rank": 8, "batch": 3, "replay": 0, "loss": "tokens"}
    return TrainConfig(**{**base, "passes": 6, "held_out_every": 2, **given})


def learnt(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def put(model, weights) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def test_a_loss_that_is_no_number_is_not_the_best():
    best = Best(patience=2, keep=False)
    for step, loss in ((1, 1.0), (2, float("nan")), (3, 0.5), (4, float("nan")), (5, 0.5)):
        best.see(step, HeldOutLoss(loss, None), {})
    assert (best.step, best.loss, best.exhausted) == (3, 0.5, True)


def test_the_best_weights_are_kept_or_the_last(llama):
    # Other decisions than those that are learnt: after some steps it only gets worse.
    start, exam, seen = learnt(llama), Lesson(decisions(1)), []

    def watch(record):
        if record.held_out:
            seen.append((record.held_out.steered, record.step, learnt(llama)))

    config = settings(learning_rate=2e-2, passes=8, keep="last")
    last = train(llama, decisions(), None, config, exam, watch)
    assert last.kept_step == last.steps == 16 and last.after == last.last
    best_loss, best_step, best = min(seen, key=lambda row: row[0])
    assert best_loss < last.last.steered, "nothing to choose between"
    put(llama, start)
    found = train(llama, decisions(), None, config.model_copy(update={"keep": "best"}), exam)
    assert found.kept_step == best_step and found.last == last.last
    assert found.after.steered == pytest.approx(best_loss, rel=1e-6)
    for name, weight in found.weights.items():
        assert torch.equal(weight, best[name]), name


def test_it_stops_early_where_held_out_no_longer_improves(llama, tmp_path):
    exam, records = Lesson(decisions(1)), []
    start = learnt(llama)
    config = settings(learning_rate=2e-2, passes=40, patience=2, keep="last", checkpoint_every=1)
    path = tmp_path / "state.safetensors"
    found = train(llama, decisions(), None, config, exam, records.append, checkpoint=path)
    assert found.steps == records[-1].step < 80
    losses = [r.held_out.steered for r in records if r.held_out]
    assert min(losses[-2:]) >= min(losses[:-2])
    put(llama, start)
    again = train(llama, decisions(), None, config, exam, checkpoint=path)
    assert again.steps == found.steps and again.last == found.last


@pytest.mark.parametrize("more", [{}, {"reuse": "host", "refresh_every": 2}, {"recorded": True}])
def test_best_and_kept_contexts_survive_a_resume(model, more, tmp_path):
    start, exam, path = learnt(model), Lesson(decisions(1)), tmp_path / "state.safetensors"
    config = settings(learning_rate=2e-2, checkpoint_every=3, tier=2, **more)
    whole = train(model, decisions(), None, config, exam)
    expected = {name: weight.clone() for name, weight in whole.weights.items()}
    for stop in (5, 11):
        path.unlink(missing_ok=True)
        put(model, start)
        seen = []
        with pytest.raises(Cancelled):
            train(
                model,
                decisions(),
                None,
                config,
                exam,
                seen.append,
                lambda stop=stop, seen=seen: len(seen) == stop,
                path,
            )
        put(model, start)
        rest = train(model, decisions(), None, config, exam, checkpoint=path)
        assert (rest.kept_step, rest.last) == (whole.kept_step, whole.last)
        for name, weight in rest.weights.items():
            assert torch.equal(weight, expected[name]), (stop, name)


SWEEP = """
import hashlib, json, os, random, signal, sys, time
from pathlib import Path
import torch
sys.path[:0] = [sys.argv[2]]
from conftest import tiny
from test_stops import decisions, settings
from workbench.train import Lesson, train
from workbench.train import checkpoint as module

path = Path(sys.argv[1]) / "state.safetensors"
config = settings(checkpoint_every=1, passes=8, held_out_every=3)
write, replace = module.save_file, os.replace

def half(tensors, target, metadata=None):
    write(tensors, target, metadata=metadata)
    os.truncate(target, target.stat().st_size // 2)
    target.with_name(".tmpABCDEF").write_bytes(b"as safetensors names its own half")
    os.kill(os.getpid(), signal.SIGKILL)

def run(how):
    if how == "while writing":
        count = [random.randrange(1, 5)]
        def some(*a, **k):
            count[0] -= 1
            (half if count[0] == 0 else write)(*a, **k)
        module.save_file = some
    if how in ("before renaming", "after renaming"):
        def then(a, b):
            if how == "after renaming":
                replace(a, b)
            os.kill(os.getpid(), signal.SIGKILL)
        os.replace = then
    model = tiny("llama")
    found = train(model, decisions(), None, config, Lesson(decisions(1)), checkpoint=path)
    digest = hashlib.sha256()
    for name, weight in sorted(found.weights.items()):
        digest.update(weight.contiguous().numpy().tobytes())
    (path.parent / "digest").write_text(digest.hexdigest())

def child(how):
    pid = os.fork()
    if pid == 0:
        run(how)
        os._exit(0)
    return pid

def finish():
    assert os.waitpid(child("whole"), 0)[1] == 0
    return (path.parent / "digest").read_text()

began = time.monotonic()
whole = finish()
takes = time.monotonic() - began
path.unlink()
random.seed(0)
kills, halves = [], 0
for how in ["while writing", "before renaming", "after renaming", "at random"] * 3:
    pid = child(how)
    if how == "at random":
        time.sleep(random.random() * takes)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    status = os.waitpid(pid, 0)[1]
    kills.append(os.WIFSIGNALED(status))
    halves += len(list(path.parent.glob(".state*")))
    if not kills[-1] or len(kills) % 4 == 0:
        assert finish() == whole
        path.unlink()
left = [f.name for f in path.parent.iterdir()]
print(json.dumps({"kills": kills, "halves": halves, "left": left}))
"""


def test_killed_at_any_moment_it_ends_with_the_same_weights(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SWEEP, str(tmp_path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert sum(found["kills"]) >= 9 and found["halves"] >= 3
    assert found["left"] == ["digest"], "half-written files are cleared away"
