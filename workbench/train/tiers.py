"""Which way a run goes through its contexts, and why.

1   whole sequences in one graph: the gradient also changes how the context is encoded
2   the context is frozen: what is learnt is how it is looked at
3   as 1, with every layer computed again in the backward pass instead of kept
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch

from workbench.train.batches import Decision

__all__ = ["Choice", "activation_bytes", "choose_tier", "free_memory"]

SHORT = 0.25
"""Share of context tokens up to which the context is cheap enough to be trained through."""
ROOM = 0.5
"""Share of the free memory that activations may take."""


@dataclass(frozen=True)
class Choice:
    """A tier and one sentence that says why."""

    tier: Literal[1, 2, 3]
    why: str


def activation_bytes(config: Any, tokens: int, learnt: int, size: int) -> int:
    """Bytes that a backward pass keeps of one batch at tier 1, to within a factor of two.

    `tokens L (16 h + 4 f) size + 12 learnt V`: sixteen values of the width h (norms, projections,
    attention, residuals) and four of the inner width f in each of L layers, and the logits three
    times in float32.

    Args:
        config: of the text model.
        tokens: positions of the batch, padding included.
        learnt: positions that get logits.
        size: bytes of a value.
    """
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    layer = 16 * config.hidden_size + 4 * inner
    return tokens * config.num_hidden_layers * layer * size + 12 * learnt * config.vocab_size


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def choose_tier(model: Any, decisions: Sequence[Decision], batch: int, free: int) -> Choice:
    """Pick a tier from the lengths of `decisions` and the memory that is free.

    Contexts that are short beside their decisions are trained through, at tier 1 where that fits
    and at tier 3 where it does not; longer ones are frozen.

    Args:
        batch: decisions of one step, replay among them.
        free: bytes.
    """
    contexts = sum(len(d.context_ids) for d in decisions)
    learnt = sum(len(d.decision_ids) for d in decisions)
    share = contexts / (contexts + learnt)
    if share > SHORT:
        return Choice(
            2,
            f"contexts are {share:.0%} of the tokens ({contexts / len(decisions):.0f} of "
            f"{(contexts + learnt) / len(decisions):.0f} on average), so they are frozen",
        )
    longest = max(len(d.context_ids) + len(d.decision_ids) for d in decisions)
    longest_decision = max(len(d.decision_ids) for d in decisions)
    config, size = model.config.get_text_config(), next(model.parameters()).element_size()
    needed = activation_bytes(config, batch * longest, batch * longest_decision, size)
    short = f"contexts are only {share:.0%} of the tokens, so the gradient goes through them"
    room = f"about {needed / 2**30:.1f} GiB of activations, {free / 2**30:.1f} GiB free"
    if needed <= ROOM * free:
        return Choice(1, f"{short}; it fits ({room})")
    return Choice(3, f"{short}; kept whole it would not fit ({room}), so layers are recomputed")
