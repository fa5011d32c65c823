"""The sums of captured activations, and how a decoder layer adds to them inside its own forward.

Behind every layer, `sum[row] += h` and `norm[row] += |h|` for each token, where `row` is the token's,
one for all layers, and row 0 is nobody's: what is added there is never read. The host counts tokens.

Letters: T tokens, D width, L blocks, R rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CaptureTable", "accumulate", "attach"]


@dataclass
class CaptureTable:
    """The buffers that the layers add to; they never move.

    Args:
        sum_LRD: float32, sums of the residual stream behind each block.
        norm_LR: float32, sums of its norms.
        row_of_token_T: int32, for the tokens of this step.
        live: in eager mode the blocks that somebody captures; None under a compiler or CUDA graphs,
            which add whether or not anybody does.
    """

    sum_LRD: Tensor
    norm_LR: Tensor
    row_of_token_T: Tensor
    live: set[int] | None = field(default=None)

    @classmethod
    def make(
        cls,
        blocks: int,
        rows: int,
        width: int,
        tokens: int,
        *,
        device: torch.device,
        eager: bool = False,
    ) -> CaptureTable:
        """Return an empty table."""
        return cls(
            torch.zeros(blocks, rows, width, device=device),
            torch.zeros(blocks, rows, device=device),
            torch.zeros(tokens, dtype=torch.int32, device=device),
            set() if eager else None,
        )

    @property
    def blocks(self) -> int:
        """L."""
        return self.sum_LRD.shape[0]

    def clear(self, row: int) -> None:
        """Begin a row's sums."""
        self.sum_LRD[:, row].zero_()
        self.norm_LR[:, row].zero_()


def attach(layers: Iterable[nn.Module], table: CaptureTable) -> None:
    """Make `layers`, whose classes `edit.attach` has wrapped, add to `table`."""
    for block, layer in enumerate(layers):
        at: Any = layer
        at.workbench_sum_RD = table.sum_LRD[block]
        at.workbench_norm_R = table.norm_LR[block]
        at.workbench_capture_row_T = table.row_of_token_T
        at.workbench_captured = table.live


def accumulate(layer: Any, output: Any) -> None:
    """Add the residual stream that `layer` returns, as one tensor or as `(hidden, residual)`."""
    if (
        layer.workbench_captured is not None
        and layer.workbench_block not in layer.workbench_captured
    ):
        return
    if isinstance(output, Tensor):
        h_TD = output.float()
    else:
        hidden_TD, residual_TD = output
        h_TD = hidden_TD.float() + residual_TD.float()
    row_T = layer.workbench_capture_row_T[: h_TD.shape[0]]
    layer.workbench_sum_RD.index_add_(0, row_T, h_TD)
    layer.workbench_norm_R.index_add_(0, row_T, h_TD.square().sum(-1).sqrt())
