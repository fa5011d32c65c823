"""Tiny seeded models that every test of training uses."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

torch.set_num_threads(1)


def tiny(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    shared = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 96,
        "tie_word_embeddings": True,
        "initializer_range": 0.15,
    }
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **shared)).eval()
    if kind == "sliding":
        config = MistralConfig(num_hidden_layers=2, sliding_window=6, **shared)
        return MistralForCausalLM(config).eval()
    config = Qwen3_5TextConfig(
        num_hidden_layers=4,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_conv_kernel_dim=4,
        **shared,
    )
    return Qwen3_5ForCausalLM(config).eval()


@pytest.fixture(params=["llama", "qwen3_5"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny("llama")


@pytest.fixture
def sliding() -> PreTrainedModel:
    return tiny("sliding")


@pytest.fixture
def hybrid() -> PreTrainedModel:
    return tiny("qwen3_5")
