"""Property tests: a delta gives the tuned bits back, whatever they are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vectors.errors import ShapeMismatch, StoreCorrupt
from vectors.tasks import decode_xor, delta, encode_xor, measure
from vectors.tasks.delta import raw_bytes, raw_view

DTYPES = {
    torch.bfloat16: np.uint16,
    torch.float16: np.uint16,
    torch.float32: np.uint32,
    torch.float64: np.uint64,
    torch.float8_e4m3fn: np.uint8,
    torch.float8_e5m2: np.uint8,
    torch.int8: np.uint8,
}
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7)


def pattern(bits: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    if not bits.size:
        return torch.empty(bits.shape, dtype=dtype)
    flat = torch.from_numpy(np.ascontiguousarray(bits).reshape(-1).view(np.uint8).copy())
    return flat.view(dtype).reshape(bits.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_bit_pattern_comes_back(dtype: torch.dtype, data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    base, tuned = (pattern(data.draw(hnp.arrays(DTYPES[dtype], shape)), dtype) for _ in range(2))
    restored = decode_xor(base, encode_xor(base, tuned))
    assert (restored.dtype, restored.shape) == (dtype, torch.Size(shape))
    assert raw_bytes(restored) == raw_bytes(tuned)


def test_all_bf16_patterns_nan_payloads_included() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    base, tuned = pattern(every, torch.bfloat16), pattern(every[::-1], torch.bfloat16)
    assert raw_bytes(decode_xor(base, encode_xor(base, tuned))) == raw_bytes(tuned)


def test_strided_tensors_and_equal_ones() -> None:
    base = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    tuned = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6).T
    assert torch.equal(decode_xor(base, encode_xor(base, tuned)), tuned)
    assert measure(base, base.clone()).changed == 0
    assert measure(base, base.clone()).norm == 0.0


def cuts(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of every way to lie in memory, no two bytes of a small one alike."""
    whole = torch.arange(48 * dtype.itemsize, dtype=torch.uint8).view(dtype)
    return {
        "of no dimension": whole[5],
        "empty": whole[:0],
        "empty, strided": whole[48::2],
        "empty, turned": whole[:0].reshape(0, 3).T,
        "one element, strided": whole[::48],
        "one column of one row": whole.reshape(1, 48)[:, 7],
        "one element, three dimensions": whole.reshape(2, 4, 6)[1:, 3:, 4:5],
        "strided": whole[1::3],
        "turned": whole.reshape(6, 8).T,
        "an inner part": whole.reshape(2, 4, 6)[:, 1:3, 2:],
        "at an offset": whole[3:20],
        "repeated": whole[4:5].expand(3, 2),
        "to be learnt": whole.clone().requires_grad_() if dtype.is_floating_point else whole,
    }


CUTS = list(cuts(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cut", CUTS)
def test_however_a_tensor_lies_in_memory(dtype: torch.dtype, cut: str) -> None:
    base = cuts(dtype)[cut]
    tuned = pattern(pattern_of(base).view(DTYPES[dtype])[::-1].reshape(base.shape), dtype)
    flat = [pattern_of(x) for x in (base, tuned)]
    assert raw_bytes(base) == raw_view(base).tobytes() == flat[0].tobytes()
    restored = decode_xor(base, encode_xor(base, tuned))
    assert (restored.dtype, restored.shape) == (dtype, base.shape)
    assert raw_bytes(restored) == flat[1].tobytes()
    size = dtype.itemsize
    changed = sum(
        flat[0].tobytes()[i : i + size] != flat[1].tobytes()[i : i + size]
        for i in range(0, base.numel() * size, size)
    )
    assert measure(base, tuned).changed == changed
    assert delta(base, tuned).shape == base.shape
    # Nothing was written into what was given, nor into what it is a part of.
    assert [x.tobytes() for x in flat] == [pattern_of(x).tobytes() for x in (base, tuned)]


def pattern_of(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of each element, one by one."""
    every = [
        tensor.detach()[tuple(int(i) for i in place)].clone().reshape(1).view(torch.uint8).numpy()
        for place in np.ndindex(*tensor.shape)
    ]
    return np.concatenate(every) if every else np.empty(0, np.uint8)


def test_restoring_changes_neither_side_and_shares_no_memory() -> None:
    base, tuned = torch.arange(6.0), torch.arange(6.0) * 2
    payload = encode_xor(base, tuned)
    restored = decode_xor(base, payload)
    restored += 1
    assert base.tolist() == [0, 1, 2, 3, 4, 5] and tuned.tolist() == [0, 2, 4, 6, 8, 10]
    assert decode_xor(base, payload).tolist() == tuned.tolist()


def test_another_default_device_changes_nothing() -> None:
    base, tuned = torch.arange(4.0), torch.arange(4.0) + 0.5
    with torch.device("meta"):
        restored = decode_xor(base, encode_xor(base, tuned))
    assert torch.equal(restored, tuned)


def test_a_small_change_of_large_fp64_weights_is_seen() -> None:
    base = torch.tensor([1e9, -3.0], dtype=torch.float64)
    tuned = base + torch.tensor([0.25, 1e-12], dtype=torch.float64)
    assert delta(base, tuned).tolist() == pytest.approx((tuned - base).tolist(), rel=1e-6)
    assert measure(base, tuned).norm == pytest.approx(0.25, rel=1e-6)


def test_golden_payload_planes() -> None:
    base = torch.tensor([1.0, 2.0]).bfloat16()  # 3f80, 4000
    tuned = torch.tensor([1.0078125, -2.0]).bfloat16()  # 3f81, c000
    payload = encode_xor(base, tuned)
    assert payload[:4] == bytes.fromhex("28b52ffd")  # a zstd frame
    assert payload[-4:] == bytes.fromhex("01 00 00 80")  # low bytes, then high bytes


def test_a_small_change_of_many_weights_is_small() -> None:
    rng = torch.Generator().manual_seed(1)
    base = (torch.randn(1 << 16, generator=rng) * 0.02).bfloat16()
    tuned = base.clone()
    tuned[::50] += 0.001
    assert len(encode_xor(base, tuned)) < base.nbytes / 20


def test_delta_is_fp32_and_zero_where_the_bits_are_equal() -> None:
    base = torch.tensor([1.0, float("inf"), -0.0, float("nan")]).bfloat16()
    tuned = torch.tensor([1.5, float("inf"), 0.0, float("nan")]).bfloat16()
    found = delta(base, tuned)
    assert found.dtype == torch.float32
    assert found.tolist() == [0.5, 0.0, 0.0, 0.0]
    assert measure(base, tuned).changed == 2  # 1.5, and the sign of the zero


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 5000), seed=st.integers(0, 2**31), threads=st.sampled_from([1, 2]))
def test_norm_is_frobenius_and_does_not_depend_on_threads(
    size: int, seed: int, threads: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    base, tuned = torch.randn(2, size, generator=rng)
    exact = math.sqrt(math.fsum(float(x) ** 2 for x in (tuned - base)))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert measure(base, tuned).norm == pytest.approx(exact, rel=1e-14)
        assert measure(base, tuned).norm == measure(base, tuned).norm
    finally:
        torch.set_num_threads(before)


def test_a_norm_that_is_not_finite_is_none() -> None:
    change = measure(torch.zeros(3), torch.tensor([0.0, float("nan"), 1.0]))
    assert (change.norm, change.changed) == (None, 2)


@pytest.mark.parametrize(
    "tuned", [torch.zeros(3), torch.zeros(2, 1), torch.zeros(2, dtype=torch.bfloat16)], ids=str
)
def test_other_shapes_and_types_are_refused(tuned: torch.Tensor) -> None:
    for function in (encode_xor, delta, measure):
        with pytest.raises(ShapeMismatch, match="same shape and type"):
            function(torch.zeros(2), tuned)


def test_damaged_payloads_are_refused() -> None:
    base = torch.randn(300, generator=torch.Generator().manual_seed(2))
    payload = encode_xor(base, base + 1)
    bomb = encode_xor(torch.zeros(1 << 20), torch.zeros(1 << 20))
    for bad in (b"", payload[:-3], b"x" + payload, payload + b"more", bomb):
        with pytest.raises(StoreCorrupt, match="payload"):
            decode_xor(base, bad)
