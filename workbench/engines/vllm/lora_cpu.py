"""vLLM's LoRA on a CPU, made right and made fast.

Its own operators (`lora/ops/torch_ops`) look up the factors of every token by the number of its slot.
A token of the base has -1, which in PyTorch is the last slot: in a batch with LoRAs the base answers
with the last one's weights. They also copy both factors once a token. Here the tokens of each LoRA are one
pair of matrix products, and tokens of the base are left alone.

Letters: T tokens, I inputs, O outputs, R rank, S slots.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

__all__ = ["Groups", "add_lora", "groups_of", "install"]

Groups = list[tuple[int, slice | Tensor]]
"""Each slot that is used with its tokens, as a slice where they are neighbours."""


def add_lora(
    out_TO: Tensor,
    in_TI: Tensor,
    downs: tuple[Tensor, ...],
    ups: tuple[Tensor, ...],
    widths: tuple[int, ...],
    groups: Groups,
    scale: float = 1.0,
) -> None:
    """Add `scale * up @ down @ x` in place, for each slice of a fused layer.

    Args:
        out_TO: the slices side by side, O the sum of `widths`.
        downs, ups: for each slice `[S, 1, R, I]` and `[S, 1, O, R]`.
    """
    for slot, tokens in groups:
        left, picked_NI = 0, in_TI[tokens]
        for down_S1RI, up_S1OR, width in zip(downs, ups, widths, strict=True):
            hidden_NR = picked_NI @ down_S1RI[slot, 0].T
            slice_TO = out_TO[:, left : left + width]
            if isinstance(tokens, slice):
                slice_TO[tokens].addmm_(hidden_NR, up_S1OR[slot, 0].T, alpha=scale)
            else:
                slice_TO.index_add_(0, tokens, hidden_NR @ up_S1OR[slot, 0].T, alpha=scale)
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
        self.workbench_groups = groups_of(self.token_lora_indices)

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
        groups = self.workbench_groups
        add_lora(out_TO, in_TI, lora_a_stacked, lora_b_stacked, output_slices, groups, scale)

    wrapper.workbench = True
    wrapper.workbench_groups = []
    wrapper.update_metadata = update_metadata
    wrapper.add_lora_linear = add_lora_linear


def groups_of(slot_of_token_T: Tensor) -> Groups:
    """The tokens of each slot; those of the base, which have -1, are in no group."""
    groups: Groups = []
    for slot in slot_of_token_T.unique().tolist():
        if slot < 0:
            continue
        tokens_N = (slot_of_token_T == slot).nonzero()[:, 0]
        first, last = int(tokens_N[0]), int(tokens_N[-1])
        together = last - first + 1 == len(tokens_N)
        groups.append((slot, slice(first, last + 1) if together else tokens_N))
    return groups
