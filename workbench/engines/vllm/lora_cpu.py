"""vLLM's LoRA on a CPU, made right and made fast.

Its own operators (`lora/ops/torch_ops`) look up the factors of every token by the number of its slot.
A token of the base has -1, which in PyTorch is the last slot: in a batch with LoRAs the base answers
with the last one's weights. They also copy both factors once a token. Here each run of tokens with one
LoRA is one pair of matrix products, and tokens of the base are left alone.

Letters: T tokens, I inputs, O outputs, R rank, S slots.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

__all__ = ["Runs", "add_lora", "install"]

Runs = list[tuple[int, int, int]]
"""Tokens from, to, and their slot; those without a LoRA are in no run."""


def add_lora(
    out_TO: Tensor,
    in_TI: Tensor,
    downs: tuple[Tensor, ...],
    ups: tuple[Tensor, ...],
    widths: tuple[int, ...],
    runs: Runs,
    scale: float = 1.0,
) -> None:
    """Add `scale * up @ down @ x` in place, for each slice of a fused layer.

    Args:
        out_TO: the slices side by side, O the sum of `widths`.
        downs, ups: for each slice `[S, 1, R, I]` and `[S, 1, O, R]`.
    """
    for first, end, slot in runs:
        left = 0
        for down_S1RI, up_S1OR, width in zip(downs, ups, widths, strict=True):
            hidden_TR = in_TI[first:end] @ down_S1RI[slot, 0].T
            out_TO[first:end, left : left + width].addmm_(
                hidden_TR, up_S1OR[slot, 0].T, alpha=scale
            )
            left += width


def install() -> None:
    """Replace what a linear layer calls on a CPU, once."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU  # noqa: PLC0415

    wrapper: Any = PunicaWrapperCPU
    if getattr(wrapper, "workbench", False):
        return
    update = wrapper.update_metadata

    @functools.wraps(update)
    def update_metadata(self: Any, *args: Any, **kw: Any) -> None:
        update(self, *args, **kw)
        slots = self.token_lora_indices.tolist()
        self.workbench_runs = runs_of(slots)

    def add_lora_linear(
        self: Any,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kw: Any,
    ) -> None:
        out_TO, in_TI = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        runs = self.workbench_runs
        add_lora(out_TO, in_TI, lora_a_stacked, lora_b_stacked, output_slices, runs, scale)

    wrapper.workbench = True
    wrapper.workbench_runs = []
    wrapper.update_metadata = update_metadata
    wrapper.add_lora_linear = add_lora_linear


def runs_of(slots: list[int]) -> Runs:
    """Neighbouring tokens of one slot, as runs."""
    runs: Runs = []
    for token, slot in enumerate(slots):
        if slot < 0:
            continue
        if runs and runs[-1][1:] == (token, slot):
            runs[-1] = (runs[-1][0], token + 1, slot)
        else:
            runs.append((token, token + 1, slot))
    return runs
