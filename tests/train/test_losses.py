"""Reference and property tests of the losses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from vectors.errors import ShapeMismatch
from workbench.train.losses import SoftTargets, soft_loss, token_loss


def logits(n: int, v: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(n, v, generator=torch.Generator().manual_seed(seed))


def exact(values: torch.Tensor, k: int) -> SoftTargets:
    """Targets in float64, so that only the formula is compared."""
    log_probs = values.double().log_softmax(1)
    top = log_probs.topk(k, 1)
    rest = log_probs.scatter(1, top.indices, -torch.inf).logsumexp(1)
    return SoftTargets(top.indices.int(), top.values, rest)


def test_equals_torch_where_the_whole_vocabulary_is_kept():
    student, teacher = logits(5, 13, 0).double().requires_grad_(), logits(5, 13, 1)
    ours = soft_loss(student, exact(teacher, 13))
    theirs = F.kl_div(
        student.log_softmax(1),
        teacher.double().log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )
    torch.testing.assert_close(ours, theirs)
    (a,) = torch.autograd.grad(ours, student, retain_graph=True)
    (b,) = torch.autograd.grad(theirs, student)
    torch.testing.assert_close(a, b)


@given(st.integers(1, 12), st.integers(0, 10**6))
def test_buckets_are_a_bound_and_equal_the_sum_by_hand(k: int, seed: int):
    student, teacher = logits(3, 12, seed).double(), logits(3, 12, seed + 1)
    target = exact(teacher, k)
    s, t = student.softmax(1), teacher.double().softmax(1)
    expected = 0.0
    for n in range(3):
        ids = target.ids_NK[n].long()
        parts = [(t[n, ids], s[n, ids])]
        if k < 12:
            parts.append((1 - t[n, ids].sum(), 1 - s[n, ids].sum()))
        expected += sum((p * (p / q).log()).sum().item() for p, q in parts) / 3
    ours = soft_loss(student, target).item()
    assert ours == pytest.approx(expected, abs=1e-9)
    assert ours <= soft_loss(student, exact(teacher, 12)).item() + 1e-12


def test_float16_targets_are_near_and_never_negative():
    student, teacher = logits(40, 300, 0), logits(40, 300, 1)
    target = SoftTargets.of(teacher, 32)
    assert target.ids_NK.dtype == torch.int32
    assert target.log_probs_NK.dtype == torch.float16
    mass = target.log_probs_NK.double().exp().sum(1) + target.log_rest_N.double().exp()
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=2e-3)
    assert soft_loss(student, target).item() == pytest.approx(
        soft_loss(student.double(), exact(teacher, 32)).item(), rel=1e-3
    )
    assert 0 <= soft_loss(teacher, target).item() < 1e-5
    everything = SoftTargets.of(teacher, 1000)
    assert everything.ids_NK.shape == (40, 300)
    assert 0 <= soft_loss(teacher, everything).item() < 1e-5


def test_gradient_is_finite_where_the_teacher_is_certain():
    student = logits(4, 50, 0).requires_grad_()
    teacher = torch.full((4, 50), -80.0)
    teacher[:, 3] = 80.0
    soft_loss(student, SoftTargets.of(teacher, 5)).backward()
    assert student.grad is not None and student.grad.isfinite().all()


def test_split_undoes_join():
    parts = [SoftTargets.of(logits(n, 20, n), 6) for n in (3, 1, 4)]
    joined = SoftTargets.join(parts)
    assert len(joined) == 8
    for one, other in zip(parts, joined.split([3, 1, 4]), strict=True):
        assert torch.equal(one.ids_NK, other.ids_NK)
        assert torch.equal(one.log_probs_NK, other.log_probs_NK)
        assert torch.equal(one.log_rest_N, other.log_rest_N)


def test_weights_of_one_share_each_give_the_mean_and_none_leaves_a_position_out():
    student, labels = logits(6, 20, 0), torch.arange(6)
    target = SoftTargets.of(logits(6, 20, 1), 5)
    first = torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0, 0.0])
    four = SoftTargets.of(logits(6, 20, 1)[:4], 5)
    torch.testing.assert_close(
        token_loss(student, labels, first), token_loss(student[:4], labels[:4])
    )
    torch.testing.assert_close(soft_loss(student, target, first), soft_loss(student[:4], four))


def test_token_loss_is_cross_entropy_and_positions_must_fit():
    student, labels = logits(4, 9, 0), torch.tensor([1, 2, 3, 0])
    by_hand = -student.log_softmax(1)[torch.arange(4), labels].mean()
    torch.testing.assert_close(token_loss(student, labels), by_hand)
    with pytest.raises(ShapeMismatch, match="3"):
        token_loss(student, labels[:3])
    with pytest.raises(ShapeMismatch, match="2"):
        soft_loss(student, SoftTargets.of(student[:2], 3))


def test_a_small_step_in_bfloat16_is_seen():
    torch.manual_seed(0)
    logits = torch.randn(64, 500).bfloat16() * 3
    labels = torch.randint(0, 500, (64,))
    exact = token_loss(logits.double(), labels)
    for weights in (None, torch.full((64,), 1 / 64)):
        found = token_loss(logits, labels, weights)
        assert found.dtype == torch.float32 and abs(found - exact) < 1e-5
