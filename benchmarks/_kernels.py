"""What the kernels' benchmarks share: timing on a CUDA device, its measured ceilings, and records."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from _results import append
from torch import Tensor
from triton.testing import do_bench

__all__ = ["ceilings", "error", "graph_ms", "median_ms", "part", "peak_mib", "record"]


def median_ms(function: Callable[[], Any]) -> float:
    """Median time of a call in milliseconds, launches included, with the L2 cache cleared before."""
    return float(do_bench(function, warmup=50, rep=200, return_mode="median"))


def graph_ms(function: Callable[[], Any]) -> float:
    """The same without the launches: captured once in a CUDA graph and replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return median_ms(graph.replay)


def peak_mib(function: Callable[[], Any]) -> float:
    """MiB that a call holds at its peak beside what was there before."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def ceilings() -> tuple[float, float]:
    """Measured bf16 matrix rate in FLOP/s, and copy bandwidth in bytes/s."""
    side = 8192
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * side**3 / (median_ms(lambda: a @ b) * 1e-3)
    source = torch.randn(2**29, device="cuda", dtype=torch.float32)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / (median_ms(lambda: target.copy_(source)) * 1e-3)
    return rate, bandwidth


def error(found: Tensor, true: Tensor) -> float:
    """Norm of the difference relative to the true norm; not a number where anything is."""
    return float((found.double() - true.double()).norm() / true.double().norm())


@contextmanager
def part(name: str) -> Iterator[None]:
    """Go on with the next part when this one fails, after the whole error is printed."""
    print(f"== {name}", flush=True)
    try:
        yield
    except Exception:
        print(traceback.format_exc(), flush=True)


def record(case: str, numbers: dict[str, Any]) -> None:
    """Print the numbers and append them to `results/<case>.jsonl`."""
    for name, value in numbers.items():
        print(f"{name:<44} {value:.5g}" if isinstance(value, float) else f"{name:<44} {value}")
    append(case, numbers)
