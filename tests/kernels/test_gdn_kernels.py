"""The gated delta rule: the kernels against the recurrence in float64, on CUDA or interpreted.

Errors are relative to the norm of the float64 result: 2e-6 in float32 in the interpreter (measured
7e-7), 4e-3 on CUDA, where products are in tf32 (measured 2.5e-3), 1e-2 for bf16 operands.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from steer_kernels import gdn, gdn_reference
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
TRITON = find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed on this machine")
if TRITON:
    from steer_kernels import gdn_triton

DEVICE = "cuda" if CUDA else "cpu"
LIMIT = 4e-3 if CUDA else 2e-6
NAN = float("nan")
NAMES = ("out", "q", "k", "v", "g", "beta")


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written is not a number."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def tensors(
    shape: tuple[int, int, int, int, int, int], lengths: list[int], seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    """q, k, v, g, beta, padded with NaN, and the state; and a gradient."""
    rows, width, keys, heads, wide, out = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    q, k = normal(rows, width, keys, wide), normal(rows, width, keys, wide)
    k = k / k.norm(dim=-1, keepdim=True)
    v, state = normal(rows, width, heads, out), normal(rows, heads, wide, out)
    g = -torch.rand(rows, width, heads, generator=generator)
    beta = torch.rand(rows, width, heads, generator=generator)
    gradient = normal(rows, width, heads, out)
    for b, length in enumerate(lengths):
        for x in (q, k, v, g, beta):
            x[b, length:] = NAN
    return [x.to(DEVICE) for x in (q, k, v, g, beta, state)], gradient.to(DEVICE)


def result(function, given: list[Tensor], gradient: Tensor, *rest) -> list[Tensor]:
    """The output and the gradients of all but the state."""
    own = [x.detach().clone().requires_grad_() for x in given[:5]]
    out = function(*own, given[5], *rest)
    return [out.detach(), *torch.autograd.grad(out, own, gradient)]


def error(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


@needs_triton
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(
    ("shape", "lengths", "chunk", "columns"),
    [
        pytest.param((2, 21, 1, 2, 16, 16), [21, 16], 16, 16, id="shared-keys"),
        pytest.param((2, 37, 2, 2, 16, 32), [1, 37], 32, 16, id="columns-in-parts"),
        pytest.param((1, 70, 1, 1, 32, 16), [70], 64, 16, id="chunks-of-64"),
        pytest.param((1, 2, 1, 1, 64, 64), [2], 32, 64, id="two-positions"),
    ],
)
def test_kernels_equal_the_float64_recurrence(
    shape: tuple[int, int, int, int, int, int],
    lengths: list[int],
    chunk: int,
    columns: int,
    normalise: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gdn_triton, "CHUNK", chunk)
    tile = gdn_triton.Tile(columns, 4)
    monkeypatch.setattr(gdn_triton, "TILES", dict.fromkeys(gdn_triton.TILES, tile))
    given, gradient = tensors(shape, lengths)
    rest = (torch.tensor(lengths, device=DEVICE), 0.4, normalise)
    found = result(gdn_triton.gated_delta_rule, given, gradient, *rest)
    double = [x.double() for x in given]
    true = result(gdn_reference.gated_delta_rule, double, gradient.double(), *rest)
    for name, a, b in zip(NAMES, found, true, strict=True):
        assert error(a, b) < LIMIT, name
        padding = torch.arange(shape[1], device=DEVICE) >= rest[0][:, None]
        assert not a[padding].any(), name


@needs_triton
def test_one_key_again_and_again_keeps_its_digits() -> None:
    """Powers of this system's matrix reach 1e18; its inverse has entries of at most one."""
    given, gradient = tensors((1, 70, 1, 1, 16, 16), [70])
    given[1][:] = given[1][:, :1]
    given[3].fill_(-1e-3)
    given[4].fill_(0.99)
    found = result(gdn_triton.gated_delta_rule, given, gradient)
    double = [x.double() for x in given]
    true = result(gdn_reference.gated_delta_rule, double, gradient.double())
    for name, a, b in zip(NAMES, found, true, strict=True):
        assert error(a, b) < 10 * LIMIT, name


@needs_triton
def test_bfloat16_and_strided_inputs() -> None:
    """Models cut q, k and v out of one `[B, channels, T]` tensor, whose rows are not dense."""
    given, gradient = tensors((1, 20, 1, 1, 16, 16), [20])
    found_of = given[:3]
    joined = torch.cat(found_of, dim=-1).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    q, k, v = joined.bfloat16().split(16, dim=-1)
    assert q.stride(1) == 1 and not q.is_contiguous()
    mixed = [q, k, v, given[3], given[4].bfloat16(), given[5]]
    own = [x.detach().requires_grad_() for x in mixed[:5]]
    out = gdn_triton.gated_delta_rule(*own, mixed[5])
    found = [out.detach(), *torch.autograd.grad(out, own, gradient.bfloat16())]
    assert [x.dtype for x in found[1:]] == [x.dtype for x in own]
    double = [x.double() for x in mixed]
    true = result(gdn_reference.gated_delta_rule, double, gradient.bfloat16().double())
    for name, a, b in zip(NAMES, found, true, strict=True):
        assert error(a, b) < 1e-2, name


@needs_triton
def test_the_state_gets_no_gradient_and_is_not_written() -> None:
    given, _ = tensors((1, 5, 1, 1, 16, 16), [5])
    state = given[5].clone().requires_grad_()
    for module in (gdn_reference, gdn_triton):
        own = [x.clone().requires_grad_() for x in given[:5]]
        module.gated_delta_rule(*own, state).sum().backward()
        assert state.grad is None
        assert torch.equal(state, given[5])


@pytest.mark.parametrize("normalise", [False, True])
def test_the_reference_is_that_of_transformers(normalise: bool) -> None:
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    given, gradient = tensors((2, 70, 2, 4, 16, 32), [70, 70])

    def theirs(q: Tensor, k: Tensor, *rest: Tensor) -> Tensor:
        wide = [x.repeat_interleave(2, dim=2) for x in (q, k)]
        v, g, beta, state = rest
        return torch_chunk_gated_delta_rule(
            *wide, v, g=g, beta=beta, initial_state=state, use_qk_l2norm_in_kernel=normalise
        )[0]

    found = result(gdn_reference.gated_delta_rule, given, gradient, None, None, normalise)
    true = result(theirs, given, gradient)
    for name, a, b in zip(NAMES, found, true, strict=True):
        assert error(a, b.double()) < 1e-5, name


def test_the_chooser_takes_the_reference_without_a_gpu() -> None:
    given, gradient = tensors((1, 3, 1, 1, 8, 8), [3])
    double = [x.double() for x in given]
    found = result(gdn.gated_delta_rule, double, gradient.double())
    true = result(gdn_reference.gated_delta_rule, double, gradient.double())
    assert all(torch.equal(a, b) for a, b in zip(found, true, strict=True))


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    q, k, v, g, beta, state = tensors((1, 3, 2, 4, 16, 16), [3])[0]
    with pytest.raises(ValueError, match="beta has shape"):
        gdn.gated_delta_rule(q, k, v, g, beta[:, :2], state)
    with pytest.raises(ValueError, match="3 value heads cannot share 2"):
        gdn.gated_delta_rule(q, k, v[:, :, :3], g[..., :3], beta[..., :3], state[:, :3])
