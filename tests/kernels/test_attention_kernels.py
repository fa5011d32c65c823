"""Frozen-prefix attention: the kernels against float64, on CUDA or in Triton's interpreter.

Errors are relative to the norm of the float64 result: 1e-6 in float32 in the interpreter (measured
4e-7), 1e-2 for 16-bit operands.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from steer_kernels import attention, attention_reference
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
TRITON = find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed on this machine")
if TRITON:
    from steer_kernels import attention_triton

DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
LIMIT = 1e-2 if CUDA else 1e-6
NAN = float("nan")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, blocks and splits at shapes that the interpreter gets through."""
    if TRITON and not CUDA:
        tile = attention_triton.Tile(16, 16, 4, 1)
        small = dict.fromkeys((64, 128, 256), tile)
        monkeypatch.setattr(
            attention_triton, "TILES", dict.fromkeys(("forward", "query", "key_value"), small)
        )


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Memory that nobody has written is not a number."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def tensors(
    shape: tuple[int, int, int, int, int, int],
    prefix_lengths_B: Tensor,
    lengths_B: Tensor,
    dtype: torch.dtype = DTYPE,
    seed: int = 0,
) -> tuple[list[Tensor], Tensor]:
    """Queries, keys, values, prefix keys and values, padded with NaN; and a gradient."""
    rows, heads, groups, width, prefix, wide = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [(heads, width), (groups, width), (groups, width), (groups, prefix), (groups, prefix)]
    made = [torch.randn(rows, h, t, wide, generator=generator) for h, t in sizes]
    gradient = torch.randn(rows, heads, width, wide, generator=generator)
    for b, (p, t) in enumerate(zip(prefix_lengths_B, lengths_B, strict=True)):
        for own in made[:3]:
            own[b, :, t:] = NAN
        for frozen in made[3:]:
            frozen[b, :, : prefix - p] = NAN
    # [B, T, H, K] in memory, as models make them.
    own = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in made[:3]]
    return [x.to(DEVICE, dtype) for x in [*own, *made[3:]]], gradient.to(DEVICE, dtype)


def result(function, given: list[Tensor], gradient: Tensor, *rest) -> list[Tensor]:
    """The output and the gradients of query, key and value."""
    own = [x.detach().clone().requires_grad_() for x in given[:3]]
    out = function(*own, *given[3:], *rest)
    return [out.detach(), *torch.autograd.grad(out, own, gradient)]


def error(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


@needs_triton
@pytest.mark.parametrize(
    ("shape", "prefix_lengths", "lengths"),
    [
        pytest.param((2, 4, 2, 13, 149, 16), [149, 18], [7, 13], id="unequal-lengths"),
        pytest.param((1, 3, 1, 5, 130, 32), [0], [5], id="no-prefix-in-a-row"),
        pytest.param((2, 2, 2, 17, 64, 16), [64, 1], [17, 1], id="no-sharing-of-heads"),
        pytest.param((1, 2, 1, 2, 3, 64), [3], [2], id="shorter-than-a-block"),
    ],
)
def test_kernels_equal_the_float64_reference(
    shape: tuple[int, int, int, int, int, int], prefix_lengths: list[int], lengths: list[int]
) -> None:
    prefix_lengths_B, lengths_B = torch.tensor(prefix_lengths), torch.tensor(lengths)
    given, gradient = tensors(shape, prefix_lengths_B, lengths_B)
    sizes = (prefix_lengths_B.to(DEVICE), lengths_B.to(DEVICE), 0.3)
    found = result(attention_triton.frozen_prefix_attention, given, gradient, *sizes)
    double = [x.double() for x in given]
    true = result(attention_reference.frozen_prefix_attention, double, gradient.double(), *sizes)
    for name, a, b in zip(("out", "q", "k", "v"), found, true, strict=True):
        assert error(a, b) < LIMIT, name
        padding = torch.arange(shape[3], device=DEVICE) >= sizes[1][:, None]
        assert not a.transpose(1, 2)[padding].any(), name


@needs_triton
@pytest.mark.parametrize("cores", [1, 8, 100])
def test_the_number_of_cores_changes_nothing(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With many, tiles of queries are shared out; here there are five tiles, or fewer on CUDA."""
    monkeypatch.setattr(attention_triton, "_cores", lambda device: cores)
    prefix_lengths_B, lengths_B = torch.tensor([9]), torch.tensor([37])
    given, gradient = tensors((1, 2, 1, 40, 9, 16), prefix_lengths_B, lengths_B)
    rest = (prefix_lengths_B.to(DEVICE), lengths_B.to(DEVICE))
    found = result(attention_triton.frozen_prefix_attention, given, gradient, *rest)
    double = [x.double() for x in given]
    true = result(attention_reference.frozen_prefix_attention, double, gradient.double(), *rest)
    assert all(error(a, b) < LIMIT for a, b in zip(found, true, strict=True))


@needs_triton
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_the_number_of_splits_changes_nothing(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_triton, "_splits", lambda *_: splits)
    # Blocks of 16: five splits of 40 keys leave two splits without a key.
    prefix_lengths_B, lengths_B = torch.tensor([40]), torch.tensor([3])
    given, gradient = tensors((1, 2, 1, 3, 40, 16), prefix_lengths_B, lengths_B)
    found = result(attention_triton.frozen_prefix_attention, given, gradient)
    double = [x.double() for x in given]
    true = result(attention_reference.frozen_prefix_attention, double, gradient.double())
    assert all(error(a, b) < LIMIT for a, b in zip(found, true, strict=True))


@needs_triton
def test_half_precision_stays_within_the_rounding_of_its_operands() -> None:
    """The interpreter multiplies no bfloat16."""
    half = torch.bfloat16 if CUDA else torch.float16
    lengths = torch.tensor([40]), torch.tensor([6])
    given, gradient = tensors((1, 2, 1, 6, 40, 16), *lengths, dtype=half)
    found = result(attention_triton.frozen_prefix_attention, given, gradient)
    assert {x.dtype for x in found} == {half}
    double = [x.double() for x in given]
    true = result(attention_reference.frozen_prefix_attention, double, gradient.double())
    assert all(error(a, b) < 1e-2 for a, b in zip(found, true, strict=True))


@needs_triton
def test_the_prefix_gets_no_gradient() -> None:
    lengths = torch.tensor([20]), torch.tensor([3])
    given, _ = tensors((1, 2, 1, 3, 20, 16), *lengths)
    frozen = [x.clone().requires_grad_() for x in given[3:]]
    for module in (attention_reference, attention_triton):
        own = [x.clone().requires_grad_() for x in given[:3]]
        module.frozen_prefix_attention(*own, *frozen).sum().backward()
        assert all(x.grad is None for x in frozen)
        assert all(x.grad is not None for x in own)


def test_the_reference_is_attention_with_joined_keys() -> None:
    lengths = torch.tensor([11]), torch.tensor([4])
    given, gradient = tensors((1, 4, 2, 4, 11, 8), *lengths, dtype=torch.float64)

    def joined(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
        mask = torch.ones(4, 15, dtype=torch.bool, device=DEVICE).tril(diagonal=11)
        keys, values = torch.cat([prefix_k, k], 2), torch.cat([prefix_v, v], 2)
        return scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)

    found = result(attention_reference.frozen_prefix_attention, given, gradient)
    true = result(joined, given, gradient)
    assert all(error(a, b) < 1e-12 for a, b in zip(found, true, strict=True))


def test_the_chooser_takes_the_reference_without_a_gpu() -> None:
    lengths = torch.tensor([5]), torch.tensor([2])
    given, gradient = tensors((1, 2, 1, 2, 5, 8), *lengths, dtype=torch.float64)
    found = result(attention.frozen_prefix_attention, given, gradient)
    true = result(attention_reference.frozen_prefix_attention, given, gradient)
    assert all(torch.equal(a, b) for a, b in zip(found, true, strict=True))


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    lengths = torch.tensor([5]), torch.tensor([2])
    q, k, v, prefix_k, prefix_v = tensors((1, 4, 2, 2, 5, 16), *lengths)[0]
    with pytest.raises(ValueError, match="prefix_v has shape"):
        attention.frozen_prefix_attention(q, k, v, prefix_k, prefix_v[:, :1])
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        attention.frozen_prefix_attention(q[:, :3], k, v, prefix_k, prefix_v)
