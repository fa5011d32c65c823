"""Read activations at the outputs of all blocks, in one batched pass.

Shape letters: B batch, T tokens, D width, L blocks, N samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vectors.errors import InputError
from workbench.data.templates import Sample
from workbench.models.blocks import decoder_blocks

__all__ = ["POSITIONS", "Position", "block_means"]

Position = Literal["completion-mean", "last", "prompt-last"]
POSITIONS: tuple[str, ...] = get_args(Position)
TOKENS_AT_ONCE = 2048


@torch.inference_mode()
def block_means(
    model: Any,
    samples: Sequence[Sample],
    position: Position = "completion-mean",
    report: Callable[[float, str], None] = lambda share, words: None,
) -> tuple[Tensor, Tensor]:
    """Return activations `[L, N, D]` at `position`, and mean norms `[L, N]` over completion tokens.

    Hooks on the blocks give the residual stream itself; `output_hidden_states` would give the last
    block's after the final norm. Samples of like length share a batch, padded on the right, where
    causal layers cannot see the padding. What all samples begin with (the template's system prompt)
    is run once and its keys and values are shared.
    """
    if position not in POSITIONS:
        raise InputError(f"The position '{position}' is unknown; use {', '.join(POSITIONS)}.")
    blocks = decoder_blocks(model)
    first: dict[int, Tensor] = {}
    norms: dict[int, Tensor] = {}
    device = next(model.parameters()).device
    done = 0
    shared = _shared_prefix(model, samples)
    prefix = _run_prefix(model, samples[0].context[:shared], device) if shared else None
    for batch in _batches(samples):
        reader = _Reader([samples[i] for i in batch], position, shared, device)
        with ExitStack() as hooks:
            for block, module in enumerate(blocks):
                hooks.callback(module.register_forward_hook(reader.hook(block)).remove)
            model(
                input_ids=reader.ids_BT,
                attention_mask=reader.mask_BT,
                past_key_values=_repeated(prefix, len(batch)),
                use_cache=prefix is not None,
                logits_to_keep=1,
            )
        for row, index in enumerate(batch):
            first[index] = torch.stack([reader.means[b][row] for b in range(len(blocks))])
            norms[index] = torch.stack([reader.norms[b][row] for b in range(len(blocks))])
        done += len(batch)
        report(done / len(samples), f"reading activations, {done} of {len(samples)} samples")
    order = range(len(samples))
    return (
        torch.stack([first[i] for i in order], 1).cpu(),
        torch.stack([norms[i] for i in order], 1).cpu(),
    )


def _shared_prefix(model: Any, samples: Sequence[Sample]) -> int:
    """How many leading context tokens all samples share, leaving one of each to be read.

    A recurrent state is kept out: its cache cannot be repeated over a batch in every version.
    """
    if "linear_attention" in (getattr(model.config, "layer_types", None) or []):
        return 0
    first = min((s.context for s in samples), key=len)
    most = len(first) - 1
    for s in samples:
        same = 0
        while same < most and s.context[same] == first[same]:
            same += 1
        most = same
    return most


def _run_prefix(model: Any, ids: Sequence[int], device: torch.device) -> Any:
    out = model(
        input_ids=torch.tensor([list(ids)], device=device), use_cache=True, logits_to_keep=1
    )
    return out.past_key_values


def _repeated(prefix: Any, batch: int) -> Any:
    if prefix is None:
        return None
    cache = copy.deepcopy(prefix)
    cache.batch_repeat_interleave(batch)
    return cache


class _Reader:
    """One batch: its ids after the shared prefix, and what the hooks found."""

    def __init__(
        self, samples: Sequence[Sample], position: Position, shared: int, device: torch.device
    ) -> None:
        longest = max(len(s) for s in samples) - shared
        self.ids_BT = torch.zeros(len(samples), longest, dtype=torch.long)
        self.mask_BT = torch.zeros(len(samples), shared + longest, dtype=torch.long)
        read_BT = torch.zeros(len(samples), longest)
        completion_BT = torch.zeros(len(samples), longest)
        for row, s in enumerate(samples):
            start, end = len(s.context) - shared, len(s) - shared
            self.ids_BT[row, :end] = torch.tensor([*s.context[shared:], *s.completion])
            self.mask_BT[row, : shared + end] = 1
            completion_BT[row, start:end] = 1
            if position == "completion-mean":
                read_BT[row, start:end] = 1
            else:
                read_BT[row, end - 1 if position == "last" else start - 1] = 1
        self.ids_BT, self.mask_BT = self.ids_BT.to(device), self.mask_BT.to(device)
        self.read_BT = (read_BT / read_BT.sum(1, keepdim=True).clamp_min(1)).to(device)
        weight = completion_BT / completion_BT.sum(1, keepdim=True).clamp_min(1)
        self.weight_BT = weight.to(device)
        self.means: dict[int, Tensor] = {}
        self.norms: dict[int, Tensor] = {}

    def hook(self, block: int) -> Callable[[Any, Any, Any], None]:
        def read(module: Any, inputs: Any, output: Any) -> None:
            h_BTD = (output if isinstance(output, Tensor) else output[0]).float()
            self.means[block] = torch.einsum("bt,btd->bd", self.read_BT, h_BTD)
            self.norms[block] = (h_BTD.norm(dim=-1) * self.weight_BT).sum(1)

        return read


def _batches(samples: Sequence[Sample]) -> list[list[int]]:
    """Indices grouped by length, so that little is padded."""
    batches: list[list[int]] = []
    for index in sorted(range(len(samples)), key=lambda i: len(samples[i])):
        length = len(samples[index])
        if not batches or (len(batches[-1]) + 1) * length > TOKENS_AT_ONCE:
            batches.append([])
        batches[-1].append(index)
    return batches
