"""Norms of gradients from their factors: the kernel against float64, on CUDA or interpreted."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
TRITON = find_spec("triton") is not None
pytestmark = pytest.mark.skipif(not TRITON, reason="Triton is not installed on this machine")
if TRITON:
    from steer_kernels import gram

DEVICE = "cuda" if CUDA else "cpu"


@pytest.mark.parametrize("tokens", [2, 64, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_are_those_of_the_formed_gradients(tokens: int, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not CUDA:
        pytest.skip("the interpreter multiplies bfloat16 by its bits")
    generator = torch.Generator().manual_seed(tokens)
    inputs, output_grads = [], []
    for n, m, wide in ((72, 200, 240), (8, 64, 80), (136, 64, 64)):
        inputs.append(torch.randn(tokens, n, generator=generator).to(DEVICE, dtype))
        # A part of a wider gradient, whose other columns are not numbers.
        dy = torch.full((tokens, wide), float("nan"))
        dy[:, wide - m :] = torch.randn(tokens, m, generator=generator)
        output_grads.append(dy.to(DEVICE, dtype)[:, wide - m :])
    table = gram.factor_table(inputs, output_grads).to(DEVICE)
    found = gram.factor_squares(table, tokens, dtype).double()
    for square, x, dy in zip(found, inputs, output_grads, strict=True):
        true = (dy.double().T @ x.double()).square().sum()
        assert abs(square - true) <= 1e-5 * true


def test_factors_that_cannot_be_addressed_are_refused() -> None:
    x, dy = torch.randn(4, 8), torch.randn(4, 16)
    with pytest.raises(ValueError, match="same tokens"):
        gram.factor_table([x, x], [dy, dy[:3]])
    with pytest.raises(ValueError, match="16 bytes"):
        gram.factor_table([x], [dy[:, 1:]])
    with pytest.raises(ValueError, match="16 bytes"):
        gram.factor_table([x], [dy[:, :7]])
