"""Load a checkpoint for extraction and training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vectors.errors import BlockNotFound, ModelNotSupported
from workbench.models.blocks import decoder_blocks
from workbench.models.catalog import Model

__all__ = ["LoadedModel", "load_model", "load_tokenizer"]


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory with its tokenizer."""

    model: Any
    tokenizer: Any
    info: Model

    @property
    def blocks(self) -> int:
        """How many decoder blocks there are."""
        return len(decoder_blocks(self.model))

    def check_block(self, block: int) -> int:
        """Return `block`, or raise BlockNotFound."""
        if not 0 <= block < self.blocks:
            raise BlockNotFound(
                f"{self.info.name} has blocks 0 to {self.blocks - 1}; there is no block {block}."
            )
        return block


def load_tokenizer(info: Model) -> Any:
    """Load the tokenizer.

    Raises:
        ModelNotSupported: none, or no chat template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(info.folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelNotSupported(
            f"{info.name} has no tokenizer that can be read: {error}."
        ) from error
    if not tokenizer.chat_template:
        raise ModelNotSupported(
            f"{info.name} has no chat template, so prompts cannot be put to it; use its instruct or "
            "chat version, or add chat_template.jinja to its folder."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(info: Model, dtype: torch.dtype | None = None) -> LoadedModel:
    """Load model and tokenizer; float32 on a CPU unless `dtype` says otherwise.

    Raises:
        ModelNotSupported: the checkpoint cannot be loaded as a decoder.
    """
    tokenizer = load_tokenizer(info)
    cuda = torch.cuda.is_available()
    wanted = dtype or (torch.bfloat16 if cuda else torch.float32)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(info.folder, dtype=wanted)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ModelNotSupported(f"{info.name} cannot be loaded: {first}.") from error
    model.to("cuda" if cuda else "cpu").eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, info)
