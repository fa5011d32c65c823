"""Real vLLM on a CUDA device, on random weights, with and without the plugin; for the scripts beside this.

vLLM finds the plugin by an entry point of a folder that is made here, so that nothing need be installed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BASE = "0" * 64
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "initializer_range": 0.06,
}
HYBRID = {
    **LLAMA,
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "tie_word_embeddings": False,  # vLLM has no tied one
    "rms_norm_eps": 1e-6,
    "linear_conv_kernel_dim": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        **LLAMA,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "head_dim": 64,
        "vocab_size": 2048,
    },
    "small-hybrid": {
        **HYBRID,
        # All experts: whether rounding changes which ones are taken is not what a check asks.
        "num_experts_per_tok": 4,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "head_dim": 128,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
        "vocab_size": 2048,
    },
    "1.5B": {
        **LLAMA,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "8B": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
    # Qwen3.5 of 0.8B in the class that vLLM 0.25.1 has for text alone, which wants one layer of experts
    # and fails where there are as many key heads as value heads.
    "0.8B hybrid": {
        **HYBRID,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "head_dim": 256,
        "linear_num_key_heads": 8,
        "linear_num_value_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "mlp_only_layers": list(range(23)),
        "moe_intermediate_size": 896,
        "shared_expert_intermediate_size": 896,
        "vocab_size": 248320,
    },
}


def prepare(work: Path) -> None:
    """What the processes share: an entry point for vLLM to find, and a configuration of each shape."""
    info = work / "site" / "steering_workbench.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: steering-workbench\nVersion: 0.1.0\n"
    )
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nworkbench_steering = workbench.engines.vllm.plugin:register\n"
    )
    for name, shape in SHAPES.items():
        (work / name).mkdir()
        (work / name / "config.json").write_text(json.dumps(shape))


def environment(work: Path, *, plugin: bool, operators: str = "add", capture: bool = False) -> Any:
    """The environment of a process that runs vLLM, with or without the plugin."""
    paths = [ROOT, ROOT / "kernels", work / "site"]
    found = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_PLUGINS": "workbench_steering",
        "WORKBENCH_LIBRARY": str(work / "library"),
        "WORKBENCH_OPERATORS": operators,
        "WORKBENCH_CAPTURE": "1" if capture else "0",
    }
    found.pop("WORKBENCH_BASE", None)
    return found | ({"WORKBENCH_BASE": BASE} if plugin else {})


def start(model: Path, **more: Any) -> Any:
    """vLLM offline in this process, as its environment says."""
    from vllm import LLM

    if "WORKBENCH_BASE" in os.environ:
        more["worker_extension_cls"] = "workbench.engines.vllm.worker.WorkbenchWorker"
    settings = {"skip_tokenizer_init": True, "max_model_len": 2048, "seed": 0}
    if "hybrid" in model.name:
        more["gdn_prefill_backend"] = "triton"  # the other ones compile for minutes
    return LLM(str(model), dtype="bfloat16", **{**settings, **more})


def runner_of(llm: Any) -> Any:
    """The model runner, which lives in this process."""
    return llm.collective_rpc(lambda worker: worker.model_runner)[0]


def save_vectors(
    work: Path,
    count: int,
    shape: dict[str, Any],
    norms: dict[int, float],
    known: dict[int, dict[int, Any]] | None = None,
) -> None:
    """Save vectors v0, v1, ... at every block, once: random ones, but for those that are `known`."""
    from vectors.steering.controls import random_direction
    from vectors.store import Library
    from vectors.types import SteeringVector

    blocks, width = shape["num_hidden_layers"], shape["hidden_size"]
    library = Library(work / "library")
    if any(True for _ in library.list()):
        return
    for n in range(count):
        drawn = {b: random_direction(width, 1000 * n + b) for b in range(blocks)}
        directions = (known or {}).get(n, drawn)
        library.save_vector(f"v{n}", SteeringVector(BASE, directions, norms, blocks // 2))
