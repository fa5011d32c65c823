"""Tiny seeded checkpoints that real engines load: a Llama, other families, and a Qwen3.5 hybrid."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["TEMPLATE", "make_family", "make_tiny_llama", "make_tokenizer"]

SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
SETS = ("accepts-direction", "brief", "cheerful", "formal")
VOCABULARY = 2048
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Save a byte-level BPE learnt on the built-in sets; any text has tokens and comes back."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    builtin = files("workbench.data").joinpath("builtin")
    texts = (builtin.joinpath(f"{name}.jsonl").read_text("utf-8") for name in SETS)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|end|>",
        pad_token="<|end|>",
        additional_special_tokens=SPECIAL[1:],
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_tiny_llama(folder: Path, seed: int = 0) -> Path:
    """Save a random Llama: 4 blocks, D 64, 2 heads of 32, vocabulary 2048, window 2048, bf16."""
    make_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.15,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def make_family(kind: str, folder: Path) -> Path:
    """Save a random model of another family, 4 blocks, D 64, without tokenizer; weights in bf16."""
    import transformers

    torch.manual_seed(0)
    shared = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "initializer_range": 0.15,
    }
    linear: dict[str, object] = {
        # The CPU kernel for Gated DeltaNet takes no heads of 32.
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
    }
    more: dict[str, dict[str, object]] = {
        "Llama": {},
        "Qwen2": {},
        "Qwen3": {},
        "Mistral": {"sliding_window": 48},
        "Gemma": {},
        "Gemma3": {"sliding_window": 48, "query_pre_attn_scalar": 32},
        "Qwen3Next": {
            **linear,
            "tie_word_embeddings": False,  # vLLM has no tied one
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
        "Qwen3_5": linear,
    }
    text = "Text" if kind in ("Gemma3", "Qwen3_5") else ""
    config = getattr(transformers, f"{kind}{text}Config")(**(shared | more[kind]))
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder
