"""Activations of many prompts on a CUDA device: captured in real vLLM against transformers' hooks.

    python benchmarks/_gpu_capture.py [--shape 1.5B] [--prompts 256] [--tokens 256] [--rounds 5]

Both have the same random weights and read the mean of the residual stream behind every block over each
prompt's second half, and bring it to the host. The hooks run prompt by prompt and in batches; all
prompts have one length, so that no batch holds padding. First all are compared with hooks in float32, of
which the engine may be little further off than hooks in bfloat16; then they are timed in turn.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _gpu_engine import SHAPES, environment, prepare, start
from _results import append

OFF = 1.5
"""How many times as far off as hooks in bfloat16 the engine may be."""
BATCHES = (1, 8, 32)
WARM = 2


def main() -> None:
    """Start vLLM in a process with the plugin's environment, and measure there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="1.5B")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, help="folder to append to")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        measure(given)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        command = [sys.executable, *sys.argv, "--work", folder]
        found = environment(Path(folder), plugin=True, capture=True)
        sys.exit(subprocess.run(command, env=found, check=False).returncode)


def measure(given: argparse.Namespace) -> None:
    """Compare, time in turn, print, and append to the results."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(given.work / given.shape)
    config.initializer_range = 0.02
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.save_pretrained(given.work / given.shape)
    llm = start(
        given.work / given.shape,
        enable_prefix_caching=False,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        disable_log_stats=True,
        gpu_memory_utilization=0.05,  # replaced by what follows
        kv_cache_memory_bytes=4 * 2**30,
        compilation_config={"cudagraph_capture_sizes": [1, 32, 256]},
    )
    draw, vocabulary = random.Random(0), SHAPES[given.shape]["vocab_size"]
    prompts = [
        [draw.randrange(2, vocabulary) for _ in range(given.tokens)] for _ in range(given.prompts)
    ]
    half = given.tokens // 2
    ways: dict[str, Callable[[], Any]] = {"engine": lambda: captured(llm, prompts, half)}
    for size in BATCHES:
        ways[f"hooks, {size} at once"] = lambda size=size: hooked(model, prompts, half, size)
    found = {name: read() for name, read in ways.items()}
    true_NLD = hooked(copy.deepcopy(model).float(), prompts, half, BATCHES[-1])
    torch.cuda.empty_cache()
    errors = {name: float((f - true_NLD).norm() / true_NLD.norm()) for name, f in found.items()}
    print({name: f"{error:.4f}" for name, error in errors.items()}, "off hooks in float32")
    if not errors["engine"] <= OFF * errors["hooks, 1 at once"]:
        sys.exit("What the engine captured differs; there is nothing to time.")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(given.rounds + WARM):
        for name, read in ways.items():
            started = time.perf_counter()
            read()
            if turn >= WARM:
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(took) for name, took in seconds.items()}
    rows = {
        name: {"seconds": [round(s, 4) for s in took], "error": errors[name]}
        | {"times_the_engine": medians[name] / medians["engine"]}
        for name, took in seconds.items()
    }
    print(f"{'way':20} {'seconds':>8} {'range':>15} {'of engine':>9}")
    for name, took in seconds.items():
        spread = f"{min(took):.3f}-{max(took):.3f}"
        times = rows[name]["times_the_engine"]
        print(f"{name:20} {medians[name]:8.3f} {spread:>15} {times:9.2f}")
    if given.results:
        kept = {name: getattr(given, name) for name in ("shape", "prompts", "tokens")}
        append("capture", {**kept, "ways": rows}, given.results)


_calls = 0


def captured(llm: Any, prompts: list[list[int]], half: int) -> Any:
    """The means `[N, L, D]` as the engine reads them."""
    import torch
    from safetensors.torch import load
    from vllm import SamplingParams

    global _calls
    _calls += 1
    names = [f"r{_calls}n{n}" for n in range(len(prompts))]
    params = [
        SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            extra_args={"capture": f"{half}-{len(prompt) - 1}", "capture_id": name},
        )
        for name, prompt in zip(names, prompts, strict=True)
    ]
    llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    data, why = llm.collective_rpc("workbench_captures", args=(names,))[0]
    if why:
        sys.exit(f"the engine did not capture: {why}")
    found = load(data)
    return torch.stack([found[f"{name}.mean"] for name in names])


def hooked(model: Any, prompts: list[list[int]], half: int, size: int) -> Any:
    """The means `[N, L, D]` by a hook on each block, `size` prompts a call."""
    import torch

    seen_LND: list[list[Any]] = [[] for _ in model.model.layers]

    def read(block: int) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            h_NTD = output if isinstance(output, torch.Tensor) else output[0]
            seen_LND[block].append(h_NTD[:, half:].float().mean(1))

        return hook

    handles = [
        layer.register_forward_hook(read(block)) for block, layer in enumerate(model.model.layers)
    ]
    with torch.inference_mode():
        for first in range(0, len(prompts), size):
            ids_NT = torch.tensor(prompts[first : first + size], device="cuda")
            model(ids_NT, use_cache=False, logits_to_keep=1)
        found = torch.stack([torch.cat(parts) for parts in seen_LND], 1).cpu()
    for handle in handles:
        handle.remove()
    return found


if __name__ == "__main__":
    main()
