"""What the student is to say: the distributions of the base with the vector on, computed once.

The teacher is the base's weights, so that its targets are made before training changes them.
Replay decisions are learnt from the base without the vector, which keeps the rest as it was.

Shape letters: B rows, T positions, D width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vectors.errors import BlockNotFound, DoseError, ShapeMismatch
from workbench.models.blocks import decoder_blocks
from workbench.train.batches import Decision, check_decisions, collate
from workbench.train.logits import whole_logits
from workbench.train.losses import SoftTargets
from workbench.train.modes import evaluating
from workbench.train.window import vocabulary_of, window_of

__all__ = ["steered", "targets"]


@contextmanager
def steered(model: PreTrainedModel, additions: Mapping[int, Tensor]) -> Iterator[None]:
    """Add vectors to the outputs of decoder blocks, at every position, while inside.

    `h_b <- h_b + a_b` (Rimsky et al., arXiv:2312.06681, section 3). The model's own output is never
    written, and the hooks come off however the block ends.

    Args:
        additions: block to `[D]`, in units of the residual stream, from `SteeringVector.addition`.

    Raises:
        BlockNotFound: a block that the model does not have.
        ShapeMismatch: an addition that is not `[D]`.
        DoseError: an addition that is not finite.
    """
    blocks = decoder_blocks(model)
    width = model.config.get_text_config().hidden_size
    for block, addition_D in additions.items():
        if not 0 <= block < len(blocks):
            raise BlockNotFound(
                f"The model has blocks 0 to {len(blocks) - 1}, and no block {block}."
            )
        if addition_D.shape != (width,):
            raise ShapeMismatch(
                f"The addition at block {block} has shape {list(addition_D.shape)}, and the "
                f"residual stream [{width}]; use a vector of this base."
            )
        if not bool(addition_D.isfinite().all()):
            raise DoseError(f"The addition at block {block} is not finite; lower the dose.")
    with ExitStack() as hooks:
        for block, addition_D in additions.items():
            handle = blocks[block].register_forward_hook(_adding(addition_D))
            hooks.callback(handle.remove)
        yield


def _adding(addition_D: Tensor) -> Callable[[nn.Module, Any, Any], Any]:
    def add(module: nn.Module, inputs: Any, output: Any) -> Any:
        h_BTD = output if isinstance(output, Tensor) else output[0]
        steered_BTD = h_BTD + addition_D.to(h_BTD)
        return steered_BTD if isinstance(output, Tensor) else (steered_BTD, *output[1:])

    return add


@torch.no_grad()
def targets(
    model: PreTrainedModel,
    decisions: Sequence[Decision],
    additions: Mapping[int, Tensor],
    k: int = 64,
    batch_size: int = 8,
    progress: Callable[[float, str], None] = lambda share, words: None,
) -> list[SoftTargets]:
    """Return the teacher's distribution at every decision token, in the order of `decisions`.

    Steered decisions are read with the additions on at every position, context included; replay
    decisions without them.

    Args:
        model: the base, before training.
        decisions: steered and replay decisions in any order.
        additions: block to `[D]`.
        k: tokens kept of each distribution; the rest is one bucket.
        batch_size: decisions read at once, alike in length.
        progress: told the share done and a sentence; an error that it raises ends the work.

    Raises:
        InputError, PromptTooLong: decisions that cannot be learnt.
        BlockNotFound, ShapeMismatch, DoseError: additions that do not fit the model.
    """
    check_decisions(decisions, window_of(model), vocabulary_of(model))
    found: dict[int, SoftTargets] = {}
    with evaluating(model):
        for kind, active in (("steered", additions), ("replay", {})):
            members = [i for i, decision in enumerate(decisions) if decision.kind == kind]
            members.sort(
                key=lambda i: len(decisions[i].context_ids) + len(decisions[i].decision_ids)
            )
            with steered(model, active):
                for start in range(0, len(members), batch_size):
                    chosen = members[start : start + batch_size]
                    batch = collate((decisions[i] for i in chosen), model.device)
                    read = SoftTargets.of(whole_logits(model, batch), k)
                    lengths = [len(decisions[i].decision_ids) for i in chosen]
                    found.update(zip(chosen, read.split(lengths), strict=True))
                    share = len(found) / len(decisions)
                    progress(share, f"asking the teacher, {len(found)} of {len(decisions)}")
    return [found[i] for i in range(len(decisions))]
