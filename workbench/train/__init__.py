"""Train a steered behaviour into the weights: frozen context, soft targets, APOLLO."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.train.apollo import Apollo
    from workbench.train.batches import Decision
    from workbench.train.config import TrainConfig
    from workbench.train.frozen import FrozenContext, freeze_context
    from workbench.train.held_out import HeldOutLoss
    from workbench.train.lesson import Lesson
    from workbench.train.loop import StepRecord, TrainResult, train
    from workbench.train.losses import SoftTargets, soft_loss, token_loss
    from workbench.train.teacher import steered, targets

__all__ = [
    "Apollo",
    "Decision",
    "FrozenContext",
    "HeldOutLoss",
    "Lesson",
    "SoftTargets",
    "StepRecord",
    "TrainConfig",
    "TrainResult",
    "freeze_context",
    "soft_loss",
    "steered",
    "targets",
    "token_loss",
    "train",
]

_HOME = {
    "Apollo": "apollo",
    "Decision": "batches",
    "FrozenContext": "frozen",
    "HeldOutLoss": "held_out",
    "Lesson": "lesson",
    "SoftTargets": "losses",
    "StepRecord": "loop",
    "TrainConfig": "config",
    "TrainResult": "loop",
    "freeze_context": "frozen",
    "soft_loss": "losses",
    "steered": "teacher",
    "targets": "teacher",
    "token_loss": "losses",
    "train": "loop",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: the package itself costs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
