"""How much a model can see, and how many tokens it knows."""

from __future__ import annotations

from transformers import PreTrainedModel

__all__ = ["vocabulary_of", "window_of"]

UNBOUNDED = 1 << 30


def window_of(model: PreTrainedModel) -> int:
    """Positions that `model` was built for; a model that names no limit has none."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or UNBOUNDED


def vocabulary_of(model: PreTrainedModel) -> int:
    """Number of token ids that `model` has a row for."""
    return next(model.get_input_embeddings().parameters()).shape[0]
