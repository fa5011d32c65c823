"""The optimizers that a training run can name."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from workbench.train.apollo import Apollo
from workbench.train.config import TrainConfig
from workbench.train.sgd import RoundedSgd

__all__ = ["make_optimizer"]

NO_PROJECTION = 1 << 62


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: TrainConfig
) -> torch.optim.Optimizer:
    """Return the optimizer of `config` over `parameters`, without weight decay.

    All round bfloat16 weights stochastically.
    """
    owned = list(parameters)
    exact = all(parameter.dtype in (torch.float32, torch.float64) for parameter in owned)
    if config.optimizer == "apollo":
        return Apollo(owned, config.learning_rate, rank=config.rank, seed=config.seed)
    if config.optimizer == "adamw" and exact:
        return torch.optim.AdamW(owned, config.learning_rate, weight_decay=0.0, fused=True)
    if config.optimizer == "adamw":
        # No matrix reaches this rank, and AdamW's own step with stochastic rounding remains.
        return Apollo(owned, config.learning_rate, rank=NO_PROJECTION, seed=config.seed)
    if not exact:
        return RoundedSgd(owned, config.learning_rate, config.seed)
    return torch.optim.SGD(owned, config.learning_rate)
