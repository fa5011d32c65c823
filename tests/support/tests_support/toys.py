"""Toy layers of every kind that can be steered, and the steering of a worker without vLLM."""

from __future__ import annotations

import torch
from torch import nn

from vectors.steering.controls import random_direction
from vectors.steering.operators import expand_rows
from vectors.types import SteeringVector
from workbench.engines.vllm import edit
from workbench.engines.vllm.capture import table as capture
from workbench.engines.vllm.capture.captures import Captures
from workbench.engines.vllm.capture.table import CaptureTable
from workbench.engines.vllm.edit import EditTable
from workbench.engines.vllm.rows import RowBank
from workbench.engines.vllm.steering import Steering

__all__ = ["BLOCKS", "KINDS", "TOKENS", "VECTORS", "WIDTH", "make"]

WIDTH, BLOCKS, TOKENS = 12, 3, 32
VECTORS = {
    name: SteeringVector(
        "0" * 64,
        {b: random_direction(WIDTH, 10 * n + b) for b in range(BLOCKS)},
        dict.fromkeys(range(BLOCKS), 2.0),
        1,
    )
    for n, name in enumerate("abcdefgh")
}


class Whole(nn.Module):
    """A layer that returns the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, h):
        return h + torch.tanh(self.mlp(h))


class Split(nn.Module):
    """A layer that returns `(hidden, residual)`."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden, residual):
        residual = hidden if residual is None else hidden + residual
        return torch.tanh(self.mlp(residual)), residual


class SplitChild(Split):
    """A layer that calls the forward of a class that is itself steered."""

    def forward(self, hidden, residual):
        return super().forward(hidden, residual)


class Toy(nn.Module):
    def __init__(self, kinds):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(kind() for kind in kinds)

    def forward(self, h):
        residual = None
        for layer in self.layers:
            if isinstance(layer, Whole):
                h = layer(h)
            else:
                h, residual = layer(h, residual)
        return h if residual is None else h + residual


KINDS = {"whole": [Whole] * 3, "split": [Split] * 3, "mixed": [Split, SplitChild, Split]}


def make(kinds="whole", *, rows=9, projecting=4, eager=False, slots=6):
    toy = Toy(KINDS[kinds]).requires_grad_(False)
    table = EditTable.make(
        BLOCKS,
        rows,
        WIDTH,
        TOKENS,
        dtype=torch.float32,
        device=torch.device("cpu"),
        projecting=projecting,
        eager=eager,
    )
    edit.attach(toy.layers, table)
    sums = CaptureTable.make(
        BLOCKS, 1 + slots, WIDTH, TOKENS, device=torch.device("cpu"), eager=eager
    )
    capture.attach(toy.layers, sums)
    bank = RowBank(table, VECTORS.__getitem__)
    return toy, Steering(table, bank, slots, expand_rows, Captures(sums, slots, expand_rows))
