"""LoRAs of single requests beside steering in real vLLM on a CUDA device, compared with plain transformers.

    python benchmarks/_gpu_lora_check.py

A small random model, compiled, with full CUDA graphs and two LoRA slots: a mixed batch of requests with
either LoRA or none, steered or not. What lies in a slot must be what was loaded; the log-probability of
every token is compared with transformers' in float32, where hooks apply LoRA and steering, and may be off
by little more than transformers' own in bfloat16. Without its LoRA it must be far off.
Exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from _gpu_engine import SHAPES, environment, prepare, start
from _gpu_steering_check import (
    OFF,
    Reference,
    greedy,
    ids_of,
    logprobs_of,
    make_model,
    off,
    prompts_of,
    references,
    vectors_of,
)

RANK, ALPHA = 4, 8
SHAPE = "small"
REQUESTS = [
    ("", ""),
    ("a", ""),
    ("b", ""),
    ("a", "v0=1.0:3"),
    ("b", "v1=1.0:0-7/decode"),
    ("", "v2=1.0:5"),
    ("a", "v3=0.7:2"),
    ("", ""),
]


def main() -> None:
    """Start vLLM in a process with the plugin's environment, and compare there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path)
    given = parser.parse_args()
    if given.work:
        check(given.work)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        found = environment(Path(folder), plugin=True)
        command = [sys.executable, __file__, "--work", folder]
        sys.exit(os.spawnve(os.P_WAIT, sys.executable, command, found))


def check(work: Path) -> None:
    """Compare everything; leave with 1 where anything is wrong."""
    from vllm.lora.request import LoRARequest

    from workbench.engines.vllm.settings import HELD

    made = make_model(work, SHAPE)
    loras = {name: make_lora(made, work / name) for name in ("a", "b")}
    exact, rounded = references(made, work)
    prompts = prompts_of(12)
    vectors_of(work, SHAPES[SHAPE], exact, prompts)
    llm = start(
        work / SHAPE,
        max_logprobs=5,
        enable_lora=True,
        max_loras=2,
        max_lora_rank=8,
        lora_target_modules=[*HELD],
        gpu_memory_utilization=0.05,  # replaced by what follows
        kv_cache_memory_bytes=2**30,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8, 16]},
    )
    asked = {name: LoRARequest(name, n, str(work / name)) for n, name in enumerate(loras, 1)}
    bad = sum(slots(llm, asked[name], loras[name]) for name in loras)

    def ask(which: list[int]) -> list[Any]:
        steers = [REQUESTS[n][1] for n in which]
        params = [greedy({"steer": steer} if steer else {}) for steer in steers]
        given = [{"prompt_token_ids": prompts[n]} for n in which]
        adapters = [asked.get(REQUESTS[n][0]) for n in which]
        return llm.generate(given, params, use_tqdm=False, lora_request=adapters)

    everything = list(range(len(REQUESTS)))
    together, alone = ask(everything), [ask([n])[0] for n in everything]
    bad += compare(prompts, together, alone, exact, rounded, loras)
    if bad:
        sys.exit(f"{bad} cases are wrong")
    print("all agree with transformers")


def make_lora(model: Any, folder: Path) -> dict[str, tuple[Any, Any]]:
    """Save a random LoRA of every linear layer; its factors `[R, I]` and `[O, R]` by module, scaled."""
    import torch
    from safetensors.torch import save_file

    from workbench.engines.vllm.settings import HELD

    factors, tensors = {}, {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in HELD:
            outs, ins = module.weight.shape
            down_RI = torch.randn(RANK, ins) / math.sqrt(ins)
            up_OR = torch.randn(outs, RANK) * 0.1
            factors[name] = (down_RI, up_OR * ALPHA / RANK)
            tensors[f"base_model.model.{name}.lora_A.weight"] = down_RI.bfloat16()
            tensors[f"base_model.model.{name}.lora_B.weight"] = up_OR.bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": [*HELD]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return factors


def slots(llm: Any, request: Any, factors: dict[str, tuple[Any, Any]]) -> int:
    """Load a LoRA as the server does; 1 if its slot holds something else."""
    call = (request.lora_name, request.lora_int_id, request.lora_path)
    held = llm.collective_rpc("workbench_lora", args=call)[0]
    norm = math.sqrt(sum(float((up @ down).norm() ** 2) for down, up in factors.values()))
    right = held["modules"] == len(factors) and math.isclose(held["norm"], norm, rel_tol=0.02)
    print(
        f"slot of {request.lora_name}: {held}, should be {len(factors)} modules of norm {norm:.3f}"
    )
    return int(not right)


@contextmanager
def applied(reference: Reference, factors: dict[str, tuple[Any, Any]] | None) -> Iterator[None]:
    """The reference's model with a LoRA, by hooks."""

    def hook(down_RI: Any, up_OR: Any) -> Any:
        def add(module: Any, inputs: Any, output: Any) -> Any:
            x = inputs[0]
            return output + x @ down_RI.to(x).T @ up_OR.to(x).T

        return add

    with ExitStack() as stack:
        for name, (down_RI, up_OR) in (factors or {}).items():
            module = reference.model.get_submodule(name)
            stack.callback(module.register_forward_hook(hook(down_RI, up_OR)).remove)
        yield


def compare(
    prompts: Any,
    together: list[Any],
    alone: list[Any],
    exact: Reference,
    rounded: Reference,
    loras: dict[str, Any],
) -> int:
    """Log-probabilities of each request's tokens; how many requests are wrong."""
    rows, bad = [], 0
    for n, ((name, _), reply) in enumerate(zip(REQUESTS, together, strict=True)):

        def of(reference: Reference, lora: str, n: int = n) -> list[float]:
            with applied(reference, loras.get(lora)):
                return reference.logprobs(prompts[n], ids_of(together[n]), REQUESTS[n][1])

        found, true = logprobs_of(reply), of(exact, name)
        other = {"": "a", "a": "b", "b": "a"}[name]
        wrong = min(statistics.median(off(found, of(exact, x))) for x in {other, ""} - {name})
        rows.append((off(found, true), off(of(rounded, name), true), wrong))
    usual = max(statistics.median(theirs) for _, theirs, _ in rows)
    most = max(max(theirs) for _, theirs, _ in rows)
    print(f"transformers in bfloat16: at most {most:.3f} off, {usual:.4f} at a request's median")
    print(f"{'LoRA':5} {'steer':22} {'worst':>7} {'median':>7} {'if wrong':>9}  alone")
    for n, (ours, _, wrong) in enumerate(rows):
        median = statistics.median(ours)
        right = median <= OFF * usual and max(ours) <= 2 * OFF * most and wrong > 3 * median
        bad += not right
        same = ids_of(together[n]) == ids_of(alone[n])
        flag = "" if right else "   WRONG"
        name, steer = REQUESTS[n]
        print(f"{name:5} {steer:22} {max(ours):7.3f} {median:7.4f} {wrong:9.3f}  {same}{flag}")
    return bad


if __name__ == "__main__":
    main()
