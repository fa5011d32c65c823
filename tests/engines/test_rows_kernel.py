"""Reference: the expand kernel against `vectors.steering.operators.expand_rows`, odd shapes."""

from __future__ import annotations

import os

import pytest
import torch

from vectors.steering.operators import expand_rows as reference

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton is not installed on this machine")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("counts", [[1], [1, 1, 1], [300, 1, 63, 257], [41], [0, 5, 0]])
@pytest.mark.parametrize("padding", [0, 1, 500])
def test_the_kernel_gives_the_rows_of_its_reference(counts, padding):
    from steer_kernels.rows import expand_rows

    generator = torch.Generator().manual_seed(sum(counts) + padding)
    requests, slots, tokens = len(counts), 17, sum(counts)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator, dtype=torch.int32)

    slots_S4 = torch.stack([draw(99, slots), draw(99, slots), draw(200, slots), draw(90, slots)], 1)
    slot_N = torch.randperm(slots, generator=generator)[:requests].int()
    ends = torch.tensor([0, *counts]).cumsum(0).int()
    # Behind the batch vLLM's buffers hold whatever an earlier step left there.
    first_N1 = torch.cat([ends, ends[-1:].repeat(3)])
    positions_T = torch.full((tokens + padding,), 10**6)
    for n, count in enumerate(counts):
        positions_T[ends[n] : ends[n + 1]] = torch.arange(count) + int(draw(150, 1))
    wanted_T, found_T = (torch.full((tokens + padding,), -7, dtype=torch.int32) for _ in range(2))
    reference(wanted_T, positions_T, first_N1, slot_N, slots_S4, requests)
    found_T = found_T.to(DEVICE)
    moved = [x.to(DEVICE) for x in (positions_T, first_N1, slot_N, slots_S4)]
    expand_rows(found_T, *moved, requests)
    assert found_T.tolist() == wanted_T.tolist()
