"""One launch a step that gives every token of a batch its row of the steering table.

Letters: T tokens, N requests, S slots.
"""

from __future__ import annotations

from typing import Any

import triton  # pyright: ignore[reportMissingImports]  # no GPU, no triton
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

__all__ = ["expand_rows"]

BLOCK = 256


# Batches differ in these at every step; a kernel for each would be compiled while people wait.
@triton.jit(do_not_specialize=["requests", "tokens"])
def _expand(
    row_of_token,
    positions,
    first_token,
    slot_of_request,
    slots,
    requests,
    tokens,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0)
    # One program more than requests: the last one clears what lies behind the batch.
    inside = n < requests
    first = tl.load(first_token + n)
    last = tl.where(inside, tl.load(first_token + tl.minimum(n + 1, requests)), tokens)
    slot = tl.load(slot_of_request + n, mask=inside, other=0).to(tl.int64)
    prompt_row = tl.load(slots + slot * 4, mask=inside, other=0)
    decode_row = tl.load(slots + slot * 4 + 1, mask=inside, other=0)
    length = tl.load(slots + slot * 4 + 2, mask=inside, other=0)
    start = tl.load(slots + slot * 4 + 3, mask=inside, other=0)
    for offset in range(first, last, BLOCK):
        t = offset + tl.arange(0, BLOCK)
        here = t < last
        p = tl.load(positions + t, mask=here & inside, other=0)
        row = tl.where(p < start, 0, tl.where(p < length, prompt_row, decode_row))
        tl.store(row_of_token + t, row, mask=here)


def expand_rows(
    row_of_token_T: Tensor,
    positions_T: Tensor,
    first_token_N1: Tensor,
    slot_of_request_N: Tensor,
    slots_S4: Tensor,
    requests: int,
) -> None:
    """Reference: `vectors.steering.operators.expand_rows`."""
    launch: Any = _expand
    launch[(requests + 1,)](
        row_of_token_T,
        positions_T,
        first_token_N1,
        slot_of_request_N,
        slots_S4,
        requests,
        row_of_token_T.shape[0],
        BLOCK=BLOCK,
    )
