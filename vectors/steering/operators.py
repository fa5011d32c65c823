"""What steering does to the residual stream: the specification that engines and kernels follow.

One edit of one block covers every operator:

    h' = h + a + (h . u) w            and, where the norm is kept, h' * |h| / |h'|

    add        a = d m v                         dose `d`, the block's mean norm `m`, unit direction `v`
    ablate     u = v,  w = -d v                  d = 1 removes the direction, 0.5 half of it
    clamp      u = v,  w = -v,  a = d m v        the projection on `v` becomes `d m`, whatever it was
    turn       a = d m v, the norm is kept       the stream turns towards `v` and grows no longer

Letters: T tokens, D width, N requests, S slots. Ablation: Arditi et al. 2024, "Refusal in Language
Models Is Mediated by a Single Direction", section 2.4.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vectors.errors import GrammarError
from vectors.grammar import OPERATORS

__all__ = ["Edit", "apply_edit", "check_together", "combine", "edit_of", "expand_rows"]

SLOT = ("prompt_row", "decode_row", "prompt_length", "start")
"""The columns of `slots_S4`."""


@dataclass(frozen=True)
class Edit:
    """What happens at one block: `h + a + (h . u) w`, with the norm kept or not; fp32 `[D]`."""

    add_D: Tensor
    read_D: Tensor | None = None
    write_D: Tensor | None = None
    keep_norm: bool = False

    @property
    def adds_only(self) -> bool:
        """Whether one addition says it all."""
        return self.read_D is None and not self.keep_norm


def edit_of(operator: str, direction_D: Tensor, mean_norm: float, dose: float) -> Edit:
    """Return the edit of `operator` at one block.

    Raises:
        GrammarError: no such operator.
    """
    v_D = direction_D.float()
    zero_D = torch.zeros_like(v_D)
    match operator:
        case "add":
            return Edit(v_D * (dose * mean_norm))
        case "ablate":
            return Edit(zero_D, v_D, v_D * -dose)
        case "clamp":
            return Edit(v_D * (dose * mean_norm), v_D, -v_D)
        case "turn":
            return Edit(v_D * (dose * mean_norm), keep_norm=True)
    raise GrammarError(f"The operator '{operator}' is unknown; use {', '.join(OPERATORS)}.")


def check_together(operators: Sequence[str]) -> None:
    """Refuse operators that one edit of one block cannot hold.

    Raises:
        GrammarError: two that read a projection, or a turn beside others.
    """
    reading = sum(o in ("ablate", "clamp") for o in operators)
    if reading > 1 or (len(operators) > 1 and "turn" in operators):
        raise GrammarError(
            "At one block and phase a request may have any number of 'add' and one 'ablate' or "
            "'clamp', or one 'turn' alone; use other blocks, phases or requests for the rest."
        )


def combine(edits: Iterable[Edit]) -> Edit:
    """Return the one edit that does all of `edits` to the same `h`; their order does not matter.

    Raises:
        GrammarError: see `check_together`.
    """
    edits = list(edits)
    check_together([_kind(e) for e in edits])
    reading = [e for e in edits if e.read_D is not None]
    added_D = torch.stack([e.add_D for e in edits]).sum(0)
    if reading:
        return Edit(added_D, reading[0].read_D, reading[0].write_D)
    return Edit(added_D, keep_norm=edits[0].keep_norm)


def _kind(edit: Edit) -> str:
    return "turn" if edit.keep_norm else "add" if edit.read_D is None else "ablate"


def apply_edit(h_TD: Tensor, edit: Edit) -> Tensor:
    """Return `h + a + (h . u) w`, its norm that of `h` where the edit says so."""
    edited_TD = h_TD + edit.add_D.to(h_TD)
    if edit.read_D is not None and edit.write_D is not None:
        edited_TD = edited_TD + (h_TD @ edit.read_D.to(h_TD))[:, None] * edit.write_D.to(h_TD)
    if edit.keep_norm:
        norm_T1 = edited_TD.norm(dim=-1, keepdim=True)
        edited_TD = edited_TD * (h_TD.norm(dim=-1, keepdim=True) / norm_T1.clamp_min(1e-20))
    return edited_TD


def expand_rows(
    row_of_token_T: Tensor,
    positions_T: Tensor,
    first_token_N1: Tensor,
    slot_of_request_N: Tensor,
    slots_S4: Tensor,
    requests: int,
) -> None:
    """Write each token's row into `row_of_token_T`, in place; row 0 for those that are not steered.

    A token of request `n` at position `p` has row 0 where `p < start`, else the prompt's row where
    `p < prompt_length`, else the decode row.

    Args:
        row_of_token_T: int32; entries behind the last request's tokens become 0.
        positions_T: each token's position in its sequence.
        first_token_N1: the token at which each request begins, and behind the last one the end.
        slot_of_request_N: the slot of each request of the batch.
        slots_S4: int32, the columns of `SLOT`.
        requests: N; the arguments may be longer.
    """
    row_of_token_T.zero_()
    for n in range(requests):
        first, last = int(first_token_N1[n]), int(first_token_N1[n + 1])
        prompt_row, decode_row, length, start = slots_S4[int(slot_of_request_N[n])].tolist()
        for token in range(first, last):
            position = int(positions_T[token])
            row = prompt_row if position < length else decode_row
            row_of_token_T[token] = row if position >= start else 0
