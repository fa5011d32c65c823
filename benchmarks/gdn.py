"""The gated delta rule from a frozen state against transformers' and flash-linear-attention's.

    PYTHONPATH=.:kernels python benchmarks/gdn.py [--decision 256] [--keys 16] [--heads 16]
        [--width 128] [--sweep]

First the kernels are compared with the recurrence in float64 and with transformers; then forward
and backward are timed, queries and keys normalised inside as models do. `--sweep` times other cuts
too; one that does not fit is skipped. flash-linear-attention is timed where it is installed; it
compiles for minutes the first time, so `--without-fla` leaves it out. Appends a line to
`benchmarks/results/gdn.jsonl`. Exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from _kernels import ceilings, error, graph_ms, median_ms, part, peak_mib, record
from steer_kernels import gdn_reference, gdn_triton
from torch import Tensor

LIMIT = 1e-2
CHUNKS = (32, 64)
CUTS = {
    "prepare": ((128, 4), (128, 8)),
    "forward": ((16, 4, 2), (16, 4, 3), (32, 4, 2), (16, 8, 2)),
    "backward": ((16, 4, 2), (16, 4, 3), (32, 4, 2), (16, 8, 2)),
    "gradients": ((32, 8), (64, 8), (32, 4), (32, 8, 2)),
}
Step = Callable[[], list[Tensor]]


def main() -> int:
    asked = arguments()
    torch.manual_seed(0)
    numbers: dict[str, Any] = dict(vars(asked))
    numbers["errors"] = verify()
    with part("ceilings"):
        rate, bandwidth = ceilings()
        numbers |= {"bf16_tflops": rate / 1e12, "copy_gb_s": bandwidth / 1e9}
        numbers |= floors(asked, rate, bandwidth)
    given, gradient = tensors(1, asked.decision, asked.keys, asked.heads, asked.width)
    with part("large shape against float64 and transformers"):
        double = [x.double() for x in given]
        true = step(reference, double, gradient.double())()
        numbers["errors"]["large"] = worst(step(kernels, given, gradient)(), true)
        numbers["transformers_error"] = worst(step(transformers_rule(), given, gradient)(), true)
    if asked.sweep:
        sweep(given, gradient, numbers)
    with part("kernels"):
        measure("kernels", kernels, given, gradient, numbers)
    with part("transformers, chunks in torch"):
        measure("transformers", transformers_rule(), given, gradient, numbers)
    if not asked.without_fla:
        with part("flash-linear-attention"):
            measure("fla", fla_rule(), given, gradient, numbers)
    record("gdn", numbers)
    return any(not e < LIMIT for e in numbers["errors"].values())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    defaults = {"decision": 256, "keys": 16, "heads": 16, "width": 128}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--without-fla", action="store_true")
    return parser.parse_args()


def tensors(rows: int, width: int, keys: int, heads: int, wide: int) -> tuple[list[Tensor], Tensor]:
    """q, k, v cut out of one bf16 tensor as models do; float32 g, bf16 beta, float32 state."""
    options: Any = {"device": "cuda"}
    channels = (2 * keys + heads) * wide
    mixed = torch.randn(rows, channels, width, dtype=torch.bfloat16, **options).transpose(1, 2)
    q, k, v = mixed.split([keys * wide, keys * wide, heads * wide], dim=-1)
    q, k, v = (x.reshape(rows, width, -1, wide) for x in (q, k, v))
    g = -torch.rand(rows, width, heads, **options)
    beta = torch.rand(rows, width, heads, **options).bfloat16()
    state = torch.randn(rows, heads, wide, wide, **options)
    gradient = torch.randn(rows, width, heads, wide, dtype=torch.bfloat16, **options)
    return [q, k, v, g, beta, state], gradient


def kernels(*given: Tensor) -> Tensor:
    return gdn_triton.gated_delta_rule(*given, normalise=True)


def reference(*given: Tensor) -> Tensor:
    return gdn_reference.gated_delta_rule(*given, normalise=True)


def transformers_rule() -> Callable[..., Tensor]:
    """The rule that transformers falls back to, whatever else is installed."""
    models = import_module("transformers.models.qwen3_5.modeling_qwen3_5")
    rule = models.torch_chunk_gated_delta_rule
    return as_models_call(getattr(rule, "__wrapped__", rule))


def fla_rule() -> Callable[..., Tensor]:
    return as_models_call(import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule)


def as_models_call(rule: Any) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
        share = v.shape[2] // q.shape[2]
        if share > 1:
            q, k = (x.repeat_interleave(share, dim=2) for x in (q, k))
        options = {"initial_state": state, "use_qk_l2norm_in_kernel": True}
        return rule(q, k, v, g=g, beta=beta, output_final_state=True, **options)[0]

    return call


def step(
    function: Callable[..., Tensor], given: list[Tensor], gradient: Tensor, *rest: Any
) -> Step:
    """One forward and backward pass, which returns the output and the five gradients."""
    leaves = [x.detach().requires_grad_() for x in given[:5]]

    def run() -> list[Tensor]:
        out = function(*leaves, given[5], *rest)
        return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]

    return run


def verify() -> dict[str, float]:
    """Compare with float64 at odd shapes; what is worst of output and gradients."""
    errors = {}
    for name, shape in {
        "shared": (2, 77, 2, 4, 128),
        "narrow": (2, 130, 4, 4, 64),
        "short": (1, 2, 1, 1, 128),
    }.items():
        with part(f"verify {name} {shape}"):
            errors[name] = float("nan")
            given, gradient = tensors(*shape)
            lengths = torch.full((shape[0],), shape[1], device="cuda")
            lengths[-1] = shape[1] // 2 + 1
            padding = torch.arange(shape[1], device="cuda") >= lengths[:, None]
            for x in given[:5]:
                x[padding] = float("nan")
            rest = (lengths, 0.1, True)
            found = step(gdn_triton.gated_delta_rule, given, gradient, *rest)()
            double = [x.double() for x in given]
            true = step(gdn_reference.gated_delta_rule, double, gradient.double(), *rest)()
            errors[name] = worst(found, true)
            names = ("o", "q", "k", "v", "g", "beta")
            print({n: error(a, b) for n, a, b in zip(names, found, true, strict=True)})
    return errors


def worst(found: list[Tensor], true: list[Tensor]) -> float:
    errors = [error(a, b) for a, b in zip(found, true, strict=True)]
    return float("nan") if any(e != e for e in errors) else max(errors)


def floors(asked: argparse.Namespace, rate: float, bandwidth: float) -> dict[str, float]:
    """Least times by operations (the recurrence's, thrice) and by bytes (each tensor once)."""
    read = asked.decision * asked.width * (2 * asked.keys + asked.heads) * 2
    state = asked.heads * asked.width**2 * 4
    operations = 3 * asked.decision * asked.heads * 6 * asked.width**2
    written = asked.decision * asked.heads * asked.width * 2
    return {
        "floor_operations_ms": operations / rate * 1e3,
        "floor_bytes_ms": (3 * read + 2 * state + 2 * written) / bandwidth * 1e3,
    }


def measure(
    name: str,
    function: Callable[..., Tensor],
    given: list[Tensor],
    gradient: Tensor,
    numbers: dict[str, Any],
) -> None:
    """Time forward, and forward with backward, eagerly and in a graph; and the peak of memory."""
    run = step(function, given, gradient)
    with torch.no_grad():
        numbers[f"{name}_forward_ms"] = median_ms(lambda: function(*given))
    numbers[f"{name}_ms"] = median_ms(run)
    numbers[f"{name}_peak_mib"] = peak_mib(run)
    print({key: value for key, value in numbers.items() if key.startswith(name)}, flush=True)
    numbers[f"{name}_graph_ms"] = graph_ms(run)
    if "floor_bytes_ms" in numbers:
        floor = max(numbers["floor_operations_ms"], numbers["floor_bytes_ms"])
        numbers[f"{name}_graph_over_floor"] = numbers[f"{name}_graph_ms"] / floor


def sweep(given: list[Tensor], gradient: Tensor, numbers: dict[str, Any]) -> None:
    """Time chunks and cuts in graphs, one kernel after the other, and keep what is fastest together."""
    fastest: tuple[float, int, dict[str, gdn_triton.Tile]] | None = None
    start, table = dict(gdn_triton.TILES), {}
    for chunk in CHUNKS:
        gdn_triton.CHUNK, best = chunk, float("inf")
        gdn_triton.TILES.update(start)
        for kernel, cuts in CUTS.items():
            chosen, best = gdn_triton.TILES[kernel], float("inf")
            for cut in cuts:
                gdn_triton.TILES[kernel] = gdn_triton.Tile(*cut)
                with part(f"sweep {kernel}, chunk {chunk}, columns, warps and stages {cut}"):
                    time = graph_ms(step(kernels, given, gradient))
                    print(f"{time:.4f} ms", flush=True)
                    table[f"{kernel} {chunk} {cut}"] = round(time, 4)
                    if time < best:
                        best, chosen = time, gdn_triton.TILES[kernel]
            gdn_triton.TILES[kernel] = chosen
        if fastest is None or best < fastest[0]:
            fastest = best, chunk, dict(gdn_triton.TILES)
    numbers["sweep"] = table
    if fastest is not None:
        _, gdn_triton.CHUNK, tiles = fastest
        gdn_triton.TILES.update(tiles)
        numbers["best"] = {"chunk": fastest[1], **{k: str(tile) for k, tile in tiles.items()}}


if __name__ == "__main__":
    sys.exit(main())
