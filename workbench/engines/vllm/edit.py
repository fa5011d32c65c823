"""The edit of the residual stream, inside the decoder layers' own forward.

It is wrapped around the layers' classes before vLLM compiles the model, so that the compiler fuses it
into a norm and CUDA graphs record it. What it reads lies in buffers that never move: a table
of rows (row 0 is zero) and the row of each token of the step, one index for all layers.

Letters: T tokens, D width, L blocks, R rows, P the first rows, which may also project.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from vectors.errors import ModelNotSupported
from workbench.engines.vllm.capture.table import accumulate
from workbench.engines.vllm.early import early, teach_compiler

__all__ = ["EditTable", "attach"]

WORDS = (
    "it must return its hidden states, or a pair of hidden states and residual whose sum is the "
    "residual stream"
)


@dataclass
class EditTable:
    """The buffers that the edit reads.

    Args:
        add_LRD: what is added, in the model's dtype.
        row_of_token_T: int32, for the tokens of this step.
        read_LPD, write_LPD, keep_LP: `u`, `w` and whether the norm is kept, for the rows below P;
            None where the engine was started for additions alone.
        live: in eager mode the blocks that have work to do, and whether that is more than adding;
            None under a compiler or CUDA graphs, which run the edit whether or not there is work.
    """

    add_LRD: Tensor
    row_of_token_T: Tensor
    read_LPD: Tensor | None = None
    write_LPD: Tensor | None = None
    keep_LP: Tensor | None = None
    live: dict[int, bool] | None = None

    @classmethod
    def make(
        cls,
        blocks: int,
        rows: int,
        width: int,
        tokens: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        projecting: int = 0,
        eager: bool = False,
    ) -> EditTable:
        """Return an empty table; `projecting` of its rows may hold other operators than `add`."""
        table = cls(
            torch.zeros(blocks, rows, width, dtype=dtype, device=device),
            torch.zeros(tokens, dtype=torch.int32, device=device),
            live={} if eager else None,
        )
        if projecting:
            shape = (blocks, projecting, width)
            table.read_LPD = torch.zeros(shape, dtype=dtype, device=device)
            table.write_LPD = torch.zeros(shape, dtype=dtype, device=device)
            table.keep_LP = torch.zeros(blocks, projecting, dtype=dtype, device=device)
        return table

    @property
    def blocks(self) -> int:
        """L."""
        return self.add_LRD.shape[0]

    @property
    def rows(self) -> int:
        """R, row 0 included."""
        return self.add_LRD.shape[1]

    @property
    def width(self) -> int:
        """D."""
        return self.add_LRD.shape[2]

    @property
    def projecting(self) -> int:
        """P, row 0 included; 0 where only additions are possible."""
        return 0 if self.read_LPD is None else self.read_LPD.shape[1]


def attach(layers: Iterable[nn.Module], table: EditTable) -> None:
    """Make `layers` apply `table`; call it before the model is first run."""
    layers = list(layers)
    if table.live is None and table.add_LRD.is_cuda:
        teach_compiler()
    for cls in {type(layer) for layer in layers}:
        _wrap(cls)
    for block, layer in enumerate(layers):
        # Plain attributes: a buffer would be swept up by whoever reloads the model's weights.
        at: Any = layer
        at.workbench_add_RD = table.add_LRD[block]
        at.workbench_row_of_token_T = table.row_of_token_T
        at.workbench_live = table.live
        at.workbench_block = block
        if table.read_LPD is not None and table.write_LPD is not None and table.keep_LP is not None:
            at.workbench_read_PD = table.read_LPD[block]
            at.workbench_write_PD = table.write_LPD[block]
            at.workbench_keep_P = table.keep_LP[block]


def _wrap(cls: Any) -> None:
    """Wrap the class's forward, once; its instances without a table run as they were."""
    if "workbench_wrapped" in vars(cls):
        return
    forward = cls.forward

    @functools.wraps(forward)
    def steered(self: Any, *args: Any, **kw: Any) -> Any:
        output = forward(self, *args, **kw)
        # A subclass that calls this forward has a wrapper of its own.
        if type(self) is not cls or self.workbench_add_RD is None:
            return output
        if self.workbench_live is None or self.workbench_block in self.workbench_live:
            output = _edit(self, output)
        if self.workbench_sum_RD is not None:
            accumulate(self, output)
        return output

    cls.workbench_wrapped = True
    cls.workbench_add_RD = None
    cls.workbench_read_PD = None
    cls.workbench_live = None
    cls.workbench_sum_RD = None
    cls.forward = steered


def _edit(layer: Any, output: Any) -> Any:
    """Edit the residual stream, which layers return as one tensor or as `(hidden, residual)`."""
    if isinstance(output, Tensor):
        return _edited(layer, output, None)
    if not isinstance(output, tuple) or len(output) != 2:
        raise ModelNotSupported(f"{type(layer).__name__} cannot be steered: {WORDS}.")
    hidden_TD, residual_TD = output
    if not isinstance(hidden_TD, Tensor) or not isinstance(residual_TD, Tensor):
        raise ModelNotSupported(f"{type(layer).__name__} cannot be steered: {WORDS}.")
    # The residual takes the edit: vLLM fuses the sum of hidden states and residual elsewhere.
    return hidden_TD, _edited(layer, residual_TD, hidden_TD)


def _edited(layer: Any, stream_TD: Tensor, other_TD: Tensor | None) -> Tensor:
    row_T = layer.workbench_row_of_token_T[: stream_TD.shape[0]]
    add_TD = embedding(row_T, layer.workbench_add_RD)
    live = layer.workbench_live
    if layer.workbench_read_PD is None or (live is not None and not live[layer.workbench_block]):
        # Only what does not need the layer's last product can be there before it.
        compiled = live is None and stream_TD.is_cuda and other_TD is not None
        return early(stream_TD + add_TD) if compiled else stream_TD + add_TD
    projecting = layer.workbench_read_PD.shape[0]
    row_T = torch.where(row_T < projecting, row_T, 0)
    read_TD = embedding(row_T, layer.workbench_read_PD).float()
    write_TD = embedding(row_T, layer.workbench_write_PD).float()
    keep_T1 = layer.workbench_keep_P[row_T].float()[:, None]
    h_TD = stream_TD.float() if other_TD is None else stream_TD.float() + other_TD.float()
    change_TD = add_TD.float() + (h_TD * read_TD).sum(-1, keepdim=True) * write_TD
    edited_TD = h_TD + change_TD
    norm_T1 = edited_TD.square().sum(-1, keepdim=True).clamp_min(1e-20)
    scale_T1 = (h_TD.square().sum(-1, keepdim=True) / norm_T1).sqrt()
    change_TD = torch.where(keep_T1 > 0, edited_TD * scale_T1 - h_TD, change_TD)
    return (stream_TD.float() + change_TD).to(stream_TD.dtype)
