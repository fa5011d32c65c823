"""The teacher: exact additions, hooks that come off, targets that do not depend on batching."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vectors.errors import BlockNotFound, Cancelled, DoseError, InputError, ShapeMismatch
from workbench.models.blocks import decoder_blocks
from workbench.train.batches import Decision
from workbench.train.teacher import steered, targets

IDS = torch.randint(0, 128, (2, 7), generator=torch.Generator().manual_seed(0))
PUSH = torch.randn(64, generator=torch.Generator().manual_seed(1))


def outputs(model) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    keep = lambda module, args, output: seen.append(  # noqa: E731
        (output if isinstance(output, torch.Tensor) else output[0]).detach().clone()
    )
    handles = [block.register_forward_hook(keep) for block in decoder_blocks(model)]
    with torch.no_grad():
        model(IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def hooks(model) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def decisions() -> list[Decision]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for line, (p, t) in enumerate([(5, 3), (9, 6), (2, 1), (7, 4)]):
        ids = torch.randint(0, 128, (p + t,), generator=generator).tolist()
        kind = "replay" if line == 3 else "steered"
        found.append(Decision(tuple(ids[:p]), tuple(ids[p:]), kind, line))
    return found


def test_adds_exactly_at_the_block_and_nothing_below(model):
    plain = outputs(model)
    with steered(model, {1: PUSH}):
        moved = outputs(model)
    assert torch.equal(moved[0], plain[0])
    assert torch.equal(moved[1], plain[1] + PUSH)
    assert not torch.equal(moved[2], plain[2])
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), plain, strict=True))


def test_blocks_that_return_tuples_are_steered_too(llama):
    class Wrapped(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, *args, **kwargs):
            self.own = self.block(*args, **kwargs)
            return self.own, "the rest"

    block = Wrapped(decoder_blocks(llama)[0])
    decoder_blocks(llama)[0] = block
    seen = []
    with steered(llama, {0: PUSH}):
        block.register_forward_hook(lambda module, args, output: seen.append(output))
        with pytest.raises(AttributeError):
            llama(IDS, use_cache=False)
    assert torch.equal(seen[0][0], block.own + PUSH)
    assert seen[0][1] == "the rest"


def test_hooks_come_off_after_an_error(model):
    before = hooks(model)
    with pytest.raises(RuntimeError, match="boom"), steered(model, {0: PUSH, 2: PUSH}):
        assert hooks(model) == before + 2
        raise RuntimeError("boom")
    assert hooks(model) == before


def test_bad_additions_are_refused_before_any_hook(llama):
    for additions, error in (
        ({0: PUSH, 9: PUSH}, BlockNotFound),
        ({0: PUSH, -1: PUSH}, BlockNotFound),
        ({0: PUSH, 1: PUSH[:5]}, ShapeMismatch),
        ({0: PUSH * math.nan}, DoseError),
    ):
        with pytest.raises(error), steered(llama, additions):
            pass
        assert hooks(llama) == 0


def test_targets_equal_one_plain_forward_each(model):
    items = decisions()
    found = targets(model, items, {1: PUSH}, k=128, batch_size=3)
    assert not any(p.grad is not None for p in model.parameters())
    for decision, target in zip(items, found, strict=True):
        ids = torch.tensor([[*decision.context_ids, *decision.decision_ids]])
        additions = {1: PUSH} if decision.kind == "steered" else {}
        with steered(model, additions), torch.no_grad():
            plain = model(ids, use_cache=False).logits[0].log_softmax(1)
        rows = plain[len(decision.context_ids) - 1 : -1]
        assert len(target) == len(decision.decision_ids) == len(rows)
        expected = rows.gather(1, target.ids_NK.long())
        torch.testing.assert_close(target.log_probs_NK.float(), expected, rtol=2e-3, atol=2e-3)


def test_progress_reaches_the_end_and_may_stop(llama):
    seen = []
    targets(llama, decisions(), {}, k=4, batch_size=1, progress=lambda s, w: seen.append(s))
    assert seen == [0.25, 0.5, 0.75, 1.0]

    def stop(share: float, words: str) -> None:
        raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        targets(llama, decisions(), {0: PUSH}, progress=stop)
    assert hooks(llama) == 0


def test_decisions_that_cannot_be_read_are_refused(llama):
    with pytest.raises(InputError, match="empty"):
        targets(llama, [Decision((1, 2), ())], {})
