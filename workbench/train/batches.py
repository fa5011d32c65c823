"""Decisions, the order in which they are learnt, and how several become one rectangle.

Shape letters: B rows, P context positions, T decision positions, N learnt tokens of all rows.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vectors.errors import InputError, PromptTooLong

__all__ = ["Batch", "Decision", "check_decisions", "collate", "order"]


@dataclass(frozen=True)
class Decision:
    """Tokens to learn, after a context that is given.

    Args:
        context_ids: at least two tokens; the last one is held back, so that it predicts the first
            token of the decision.
        decision_ids: the tokens that are learnt.
        kind: "steered" is learnt from the steered model, "replay" keeps the base as it was.
        line: the line or prompt that it comes from, by which errors name it.
    """

    context_ids: tuple[int, ...]
    decision_ids: tuple[int, ...]
    kind: Literal["steered", "replay"] = "steered"
    line: int = 0


@dataclass(frozen=True)
class Batch:
    """Decisions side by side: contexts padded on the left, decisions on the right.

    Args:
        context_ids_BP: int64 `[B, P]`, every context but its last token.
        context_mask_BP: bool `[B, P]`.
        decision_ids_BT: int64 `[B, T]`, T >= 2: the context's last token and the decision but its
            last token, which predicts nothing that is learnt.
        decision_mask_BT: bool `[B, T]`; it marks the tokens, and these are the positions whose
            logits are learnt.
        labels_N: int64 `[N]`, the tokens that those positions predict, row by row.
    """

    context_ids_BP: Tensor
    context_mask_BP: Tensor
    decision_ids_BT: Tensor
    decision_mask_BT: Tensor
    labels_N: Tensor


def check_decisions(decisions: Sequence[Decision], window: int, vocabulary: int) -> None:
    """Refuse decisions that cannot be learnt, naming the first of them.

    Args:
        decisions: what is to be learnt.
        window: positions that the model can see.
        vocabulary: number of token ids.

    Raises:
        InputError: none at all, an empty decision, a context of fewer than two tokens, or a token
            that the vocabulary does not have.
        PromptTooLong: context and decision together are longer than the window.
    """
    if not decisions:
        raise InputError("There is nothing to learn; give at least one decision.")
    for decision in decisions:
        name = f"The {'replay ' * (decision.kind == 'replay')}decision of line {decision.line}"
        context, tokens = decision.context_ids, decision.decision_ids
        if not tokens:
            raise InputError(f"{name} is empty; give it at least one token, or leave it out.")
        if len(context) < 2:
            raise InputError(
                f"{name} has a context of {len(context)} tokens; it needs at least two, "
                "so use the chat template."
            )
        if len(context) + len(tokens) > window:
            raise PromptTooLong(
                f"{name} has {len(context)} + {len(tokens)} tokens, and the model sees {window}; "
                "shorten the prompt or the decision."
            )
        wrong = [token for token in (*context, *tokens) if not 0 <= token < vocabulary]
        if wrong:
            raise InputError(
                f"{name} holds token {wrong[0]}, and the model has {vocabulary} tokens; "
                "use this model's own tokenizer."
            )


def order(
    decisions: Sequence[Decision], batch: int, replay_share: float, passes: int, seed: int
) -> list[list[int]]:
    """Return the decisions of every step, as indices: shuffled, with replay at a set share.

    After s steered decisions, `round(s * share / (1 - share))` replay decisions have been used, so
    that the share holds over the run whatever the batch. Replay starts over where it runs out.

    Args:
        decisions: steered and replay decisions in any order.
        batch: steered decisions of one step; replay comes on top.
        replay_share: share of replay among all decisions, in [0, 1).
        passes: times that every steered decision is used.
        seed: the order is a function of it.

    Raises:
        InputError: no steered decision, or a share of replay without replay decisions.
    """
    steered = [i for i, decision in enumerate(decisions) if decision.kind == "steered"]
    replay = [i for i, decision in enumerate(decisions) if decision.kind == "replay"]
    if not steered:
        raise InputError("There is no steered decision to learn; replay alone teaches nothing.")
    if replay_share > 0 and not replay:
        raise InputError(
            f"A replay share of {replay_share:g} was asked for, and there is no replay decision; "
            "add some, or set the share to 0."
        )
    rng = random.Random(seed)
    steps: list[list[int]] = []
    queue: list[int] = []
    used = replayed = 0
    for _ in range(passes):
        shuffled = rng.sample(steered, len(steered))
        for start in range(0, len(shuffled), batch):
            step = shuffled[start : start + batch]
            used += len(step)
            due = round(used * replay_share / (1 - replay_share)) - replayed
            replayed += due
            while len(queue) < due:
                queue += rng.sample(replay, len(replay))
            steps.append(step + queue[:due])
            del queue[:due]
    return steps


def collate(decisions: Iterable[Decision], device: torch.device | str = "cpu") -> Batch:
    """Return decisions as one `Batch`; each must have passed `check_decisions`."""
    chosen = list(decisions)
    contexts = [decision.context_ids[:-1] for decision in chosen]
    inputs = [(d.context_ids[-1], *d.decision_ids[:-1]) for d in chosen]
    labels = [token for decision in chosen for token in decision.decision_ids]
    context_width = max(len(row) for row in contexts)
    decision_width = max(2, *(len(row) for row in inputs))
    rows = range(len(chosen))
    context_ids_BP = torch.zeros(len(chosen), context_width, dtype=torch.int64)
    context_mask_BP = torch.zeros(len(chosen), context_width, dtype=torch.bool)
    decision_ids_BT = torch.zeros(len(chosen), decision_width, dtype=torch.int64)
    decision_mask_BT = torch.zeros(len(chosen), decision_width, dtype=torch.bool)
    for row, context, decision in zip(rows, contexts, inputs, strict=True):
        context_ids_BP[row, context_width - len(context) :] = torch.tensor(context)
        context_mask_BP[row, context_width - len(context) :] = True
        decision_ids_BT[row, : len(decision)] = torch.tensor(decision)
        decision_mask_BT[row, : len(decision)] = True
    tensors = (context_ids_BP, context_mask_BP, decision_ids_BT, decision_mask_BT)
    return Batch(*(t.to(device) for t in (*tensors, torch.tensor(labels, dtype=torch.int64))))
