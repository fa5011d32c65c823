"""The fused pass over bf16 against the plain one, to the last bit."""

from __future__ import annotations

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from vectors.store.encode import planes_bf16
from vectors.tasks.delta import encode_xor, measure, raw_view

BITS = st.integers(-(1 << 15), (1 << 15) - 1)


def compare(base: torch.Tensor, tuned: torch.Tensor) -> None:
    planes_IP, changed, norm = planes_bf16(
        raw_view(base).view("uint16"), raw_view(tuned).view("uint16")
    )
    expected = measure(base, tuned)
    assert (changed, norm) == (expected.changed, expected.norm)
    plain = zstandard.decompress(encode_xor(base, tuned), max_output_size=base.nbytes + 1)
    assert planes_IP.tobytes() == plain


@settings(deadline=None)  # the first example compiles
@given(st.lists(st.tuples(BITS, BITS), min_size=1, max_size=40))
def test_any_bits(pairs: list[tuple[int, int]]) -> None:
    # Every pattern: zeros of both signs, subnormal numbers, infinities, NaN with payloads.
    base, tuned = (torch.tensor(side, dtype=torch.int16) for side in zip(*pairs, strict=True))
    compare(base.view(torch.bfloat16), tuned.view(torch.bfloat16))


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, (1 << 20) + 1, (1 << 20) + 1500])
def test_sizes_around_the_lanes_and_parts(count: int) -> None:
    rng = torch.Generator().manual_seed(count)
    base = (torch.randn(count, generator=rng) * 0.02).bfloat16()
    tuned = (base.float() + torch.randn(count, generator=rng) * 0.002).bfloat16()
    compare(base, tuned)
    compare(base, base)
