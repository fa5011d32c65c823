"""The short convolution: the kernels against float64, on CUDA or interpreted, and transformers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from steer_kernels.conv import conv_reference, conv_silu
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
TRITON = find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed on this machine")
if TRITON:
    from steer_kernels import conv_triton

DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written is not a number."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def tensors(rows: int, width: int, sizes: tuple[int, ...], taps: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    channels = sum(sizes)
    # Inputs are columns of a wider product; the state keeps one position more than is needed.
    wide = torch.randn(rows, width, channels + 8, generator=generator)
    state = torch.randn(rows, channels, taps, generator=generator)
    weight = torch.randn(channels, taps, generator=generator)
    grads = [torch.randn(rows, width, size, generator=generator) for size in sizes]
    return [x.to(DEVICE) for x in (wide, state, weight, *grads)]


def results(function, made: list[Tensor], sizes: tuple[int, ...]) -> list[Tensor]:
    wide, state, weight, *grads = made
    leaf, taps = wide.clone().requires_grad_(), weight.clone().requires_grad_()
    parts = function(leaf[:, :, : sum(sizes)], state, taps, sizes)
    torch.autograd.backward(parts, grads)
    assert leaf.grad is not None and taps.grad is not None
    return [*(part.detach() for part in parts), leaf.grad, taps.grad]


@needs_triton
@pytest.mark.parametrize(
    ("rows", "width", "sizes", "taps"),
    [(1, 70, (32, 32, 64), 4), (2, 33, (16, 16, 48), 4), (2, 2, (16, 16, 16), 2)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_equal_the_float64_reference(
    rows: int, width: int, sizes: tuple[int, ...], taps: int, dtype: torch.dtype
) -> None:
    made = [x.to(dtype) for x in tensors(rows, width, sizes, taps, seed=width)]
    found = results(conv_triton.conv_silu, made, sizes)
    true = results(conv_reference, [x.double() for x in made], sizes)
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    for own, other in zip(found, true, strict=True):
        assert own.dtype == dtype
        assert (own.double() - other).norm() < limit * other.norm()


def test_the_reference_is_a_convolution_of_what_came_before() -> None:
    made = tensors(2, 9, (4, 4, 8), 4, seed=5)
    wide, state, taps = (x.double() for x in made[:3])
    x = wide[:, :, :16]
    joined = torch.cat([state[:, :, 1:].transpose(1, 2), x], 1).transpose(1, 2)
    mixed = torch.nn.functional.conv1d(joined, taps[:, None], groups=16)
    true = torch.nn.functional.silu(mixed).transpose(1, 2)
    assert torch.allclose(torch.cat(conv_silu(x, state, taps, (4, 4, 8)), 2), true)
