"""APOLLO's step: its error to float64 and its time beside AdamW's; on a GPU, its kernels.

workbench bench apollo [--json]       on a CPU
python benchmarks/apollo.py --tune    on a GPU; needs torch and triton alone
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from _results import append  # noqa: E402

from workbench.train.apollo import Apollo  # noqa: E402  # after the path is set

# One layer of the bundled model, 3.5 million parameters, and its norms.
SHAPES = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
SHAPES += [(576,), (576,)]
RANK, STEPS, LAYERS, ROUNDS = 128, 10, 4, 5


def main() -> None:
    """Measure on the device at hand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--cpu", action="store_true", help="the CPU's part, even beside a GPU")
    parser.add_argument("--tune", action="store_true", help="GPU: try other launch parameters too")
    parser.add_argument("--layers", type=int, default=32, help="GPU: layers of an 8B model")
    parser.add_argument("--seconds", type=float, default=220, help="GPU: begin no part after that")
    options, _ = parser.parse_known_args()
    if torch.cuda.is_available() and not options.cpu:
        import _gpu_apollo  # needs triton

        _gpu_apollo.main(options)
        return
    result = {
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "parameters": LAYERS * sum(nn.Parameter(torch.empty(s)).numel() for s in SHAPES),
        "rank": RANK,
        "dtypes": {name: measured(dtype) for name, dtype in DTYPES.items()},
    }
    append("apollo", result)
    if options.json:
        print(json.dumps(result))
        return
    print(f"APOLLO, rank {RANK}, beside AdamW: {result['parameters'] / 1e6:.1f} M parameters")
    print("weights    error to float64   APOLLO ms   AdamW ms   ratio")
    for name, row in result["dtypes"].items():
        print(
            f"{name:9}  {row['error']:16.1e}  {row['apollo_ms']:10.1f}  {row['adamw_ms']:9.1f}"
            f"  {row['ratio_to_adamw']:6.2f}"
        )


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def measured(dtype: torch.dtype) -> dict[str, Any]:
    """Return the error of ten steps and the times of one, alternating, the best of five."""
    apollo = optimizer_of(dtype, lambda p: Apollo(p, rank=RANK))
    adamw = optimizer_of(
        dtype, lambda p: torch.optim.AdamW(p, lr=5e-5, weight_decay=0.0, fused=True)
    )
    times: dict[str, list[float]] = {"apollo": [], "adamw": []}
    for _ in range(ROUNDS):
        for name, optimizer in (("apollo", apollo), ("adamw", adamw)):
            began = time.perf_counter()
            optimizer.step()
            times[name].append((time.perf_counter() - began) * 1e3)
    best = {name: min(values) for name, values in times.items()}
    return {
        "error": error(dtype),
        "apollo_ms": best["apollo"],
        "adamw_ms": best["adamw"],
        "ratio_to_adamw": best["apollo"] / best["adamw"],
    }


def optimizer_of(
    dtype: torch.dtype, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> torch.optim.Optimizer:
    """Return an optimizer over some layers with gradients, past its first step."""
    parameters = []
    for seed, shape in enumerate(SHAPES * LAYERS):
        parameter = nn.Parameter(numbers(shape, seed).to(dtype) * 0.02)
        parameter.grad = numbers(shape, seed + 1000).to(dtype)
        parameters.append(parameter)
    optimizer = make(parameters)
    optimizer.step()
    return optimizer


def error(dtype: torch.dtype) -> float:
    """Return `||dW - dW64|| / ||dW64||` of ten steps, dW the change of the weights; with bfloat16
    weights this holds the noise of its rounding, which is right on average."""
    moved = []
    for wide in (dtype, torch.float64):
        start = [numbers(shape, i).mul(0.02).to(dtype).to(wide) for i, shape in enumerate(SHAPES)]
        parameters = [nn.Parameter(w.clone()) for w in start]
        optimizer = Apollo(parameters, lr=1e-3, rank=RANK, refresh=4)
        for step in range(STEPS):
            for i, parameter in enumerate(parameters):
                given = numbers(tuple(parameter.shape), 100 * step + i).to(dtype)
                parameter.grad = given.to(wide)
            optimizer.step()
        moved.append([p.detach().double() - w for p, w in zip(parameters, start, strict=True)])
    off = sum(((a - b) ** 2).sum() for a, b in zip(*moved, strict=True))
    whole = sum((b**2).sum() for b in moved[1])
    return float((torch.as_tensor(off) / torch.as_tensor(whole)).sqrt())


def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    """Return seeded normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


if __name__ == "__main__":
    main()
