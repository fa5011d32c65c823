"""The loss in place: values and gradients are those of the reference in float64."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from workbench.train.losses import SoftTargets, soft_loss, token_loss

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
TRITON = find_spec("triton") is not None
pytestmark = pytest.mark.skipif(not TRITON, reason="Triton is not installed on this machine")
if TRITON:
    from steer_kernels import soft_loss as kernels

DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    if TRITON:
        monkeypatch.setattr(kernels, "CUT", {"BLOCK": 64, "num_warps": 4})


def results(function, logits_NV: Tensor, weights_N: Tensor) -> tuple[float, Tensor]:
    own = logits_NV.clone().requires_grad_()
    # As in a model, the logits are no leaf; the kernel spends them.
    loss = function(own * 1.0, weights_N)
    (2.5 * loss).backward()
    assert own.grad is not None
    return float(loss.detach()), own.grad


def check(kernel, reference, logits_NV: Tensor, weights_N: Tensor) -> None:
    found, gradient = results(kernel, logits_NV, weights_N)
    true, expected = results(reference, logits_NV.double(), weights_N.double())
    half = logits_NV.dtype == torch.bfloat16
    assert found == pytest.approx(true, rel=1e-5)
    error = (gradient.double() - expected).norm() / expected.norm()
    assert error < (1e-2 if half else 1e-5)
    assert not gradient[weights_N == 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [1, 5, 32, 150])
def test_loss_and_gradient_are_those_of_the_reference(dtype: torch.dtype, kept: int) -> None:
    generator = torch.Generator().manual_seed(kept)
    teacher, logits = torch.randn(2, 6, 150, generator=generator) * 3
    target = SoftTargets.join([SoftTargets.of(teacher, kept)], DEVICE)
    weights = torch.rand(6, generator=generator)
    weights[2] = 0.0
    check(
        lambda x, w: kernels.spending_soft_loss(
            x, target.ids_NK, target.log_probs_NK, target.log_rest_N, w
        ),
        lambda x, w: soft_loss(x, target, w),
        logits.to(DEVICE, dtype),
        weights.to(DEVICE),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_certain_teacher_gives_the_cross_entropy_of_its_tokens(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 200, generator=generator).to(DEVICE, dtype) * 5
    labels = torch.randint(0, 200, (5,), generator=generator).to(DEVICE)
    target = SoftTargets.certain(labels, 1, 200)
    check(
        lambda x, w: kernels.spending_soft_loss(
            x, target.ids_NK, target.log_probs_NK, target.log_rest_N, w
        ),
        lambda x, w: token_loss(x, labels, w),
        logits,
        torch.rand(5, generator=generator).to(DEVICE),
    )


def test_logits_are_as_before_until_the_backward_pass_and_padding_may_be_anything() -> None:
    logits = torch.randn(3, 100, device=DEVICE)
    logits[1] = torch.nan
    target = SoftTargets.of(torch.randn(3, 100, device=DEVICE), 7)
    weights = torch.tensor([0.5, 0.0, 0.5], device=DEVICE)
    before, own = logits.clone(), logits.requires_grad_()
    loss = kernels.spending_soft_loss(
        own, target.ids_NK, target.log_probs_NK, target.log_rest_N, weights
    )
    assert torch.equal(own.detach().nan_to_num(), before.nan_to_num()) and loss.isfinite()
    (gradient,) = torch.autograd.grad(loss, own)
    assert gradient.isfinite().all()
    for bad in (torch.nan, torch.inf):
        spoilt = before.nan_to_num()
        spoilt[0, 50] = bad
        loss = kernels.spending_soft_loss(
            spoilt, target.ids_NK, target.log_probs_NK, target.log_rest_N, weights
        )
        assert not loss.isfinite()
