"""The GPU's part of `benchmarks/apollo.py`: verify the kernels, then time an 8B model's matrices.

Every part stands alone and prints its full error if it fails. Results go to
`benchmarks/results/apollo.jsonl`, a line for each.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from _results import append
from steer_kernels import apollo as kernels
from torch import Tensor, nn

from workbench.train import apollo_steps as reference
from workbench.train.apollo import Apollo
from workbench.train.factored import NAME, Factors
from workbench.train.projection import projection

DEVICE = torch.device("cuda")
BF16 = torch.bfloat16
RANK = 256
# The seven matrices of one of the 32 layers of Llama-3-8B: q, k, v, o, gate, up, down.
LAYER = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)]
LAYER += [(14336, 4096), (14336, 4096), (4096, 14336)]
BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12}
RULE = {"scaling": "channel", "scale": "auto", "limiter": 1.01, "compat": False}
RULE |= {"betas": (0.9, 0.999), "eps": 1e-8}

# Shapes to verify with, and tokens of their factors; Hopper's own kernels take three of them.
VERIFIED = [((384, 320), 200), ((320, 390), 200), ((384, 1040), 50), ((1100, 1024), 100)]

# Other launch parameters to try with --tune; `steer_kernels.apollo.TILES` holds those in use.
OTHERS: dict[str, list[dict[str, Any]]] = {
    "project": [
        {"ROWS": 128, "STEP": 64, "num_warps": 8, "num_stages": 3},
        {"ROWS": 128, "STEP": 32, "num_warps": 8, "num_stages": 4},
        {"ROWS": 64, "STEP": 64, "num_warps": 4, "num_stages": 3},
    ],
    "move": [
        {"ROWS": 8, "COLUMNS": 512, "num_warps": 8, "num_stages": 1},
        {"ROWS": 2, "COLUMNS": 1024, "num_warps": 4, "num_stages": 1},
        {"ROWS": 4, "COLUMNS": 512, "num_warps": 4, "num_stages": 1},
        {"ROWS": 8, "COLUMNS": 1024, "num_warps": 8, "num_stages": 1},
    ],
    "move_factored": [
        {"COLUMNS": 128, "STEP": 64, "num_warps": 8, "num_stages": 3, "maxnreg": 128},
        {"COLUMNS": 128, "STEP": 32, "num_warps": 8, "num_stages": 3, "maxnreg": 128},
        {"COLUMNS": 64, "STEP": 64, "num_warps": 4, "num_stages": 3, "maxnreg": 168},
        {"COLUMNS": 128, "STEP": 64, "num_warps": 4, "num_stages": 2},
    ],
    "project_factored": [
        {"ROWS": 128, "COLUMNS": 64, "STEP": 64, "num_warps": 8, "num_stages": 2},
        {"ROWS": 128, "COLUMNS": 32, "STEP": 64, "num_warps": 8, "num_stages": 2},
        {"ROWS": 64, "COLUMNS": 32, "STEP": 64, "num_warps": 4, "num_stages": 2},
    ],
    "norm_factored": [
        {"SIDE": 128, "STEP": 64, "num_warps": 8, "num_stages": 3},
        {"SIDE": 64, "STEP": 128, "num_warps": 4, "num_stages": 3},
    ],
    "shrink": [
        {"ROWS": 128, "STEP": 64, "num_warps": 8, "num_stages": 3},
        {"ROWS": 64, "STEP": 64, "num_warps": 8, "num_stages": 4},
    ],
}


def main(options: argparse.Namespace) -> None:
    """Verify, time, and perhaps tune."""
    began = time.monotonic()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    note(case="copy", bytes_per_second=copying())
    for dtype, (shape, tokens), kind in itertools.product(
        (torch.float32, BF16), VERIFIED, ("dense", "factored")
    ):
        with part(f"verify {kind} {shape} {dtype}"):
            verify(kind, shape, tokens, dtype)
    with part("verify adamw"):
        verify_adamw()
    dense_ms = None
    with part("fused"):
        dense_ms = fused(options.layers)
    torch.cuda.empty_cache()
    for tokens in (256, 64, 128):
        with part(f"factored, {tokens} tokens"):
            factored(options.layers, tokens)
        torch.cuda.empty_cache()
    with part("plain"):
        plain(options.layers, dense_ms)
    torch.cuda.empty_cache()
    if options.tune:
        tune(min(options.layers, 8), began + options.seconds)


@contextmanager
def part(name: str) -> Iterator[None]:
    """Go on with the next part when one fails, and print why."""
    began = time.monotonic()
    try:
        yield
    except Exception:
        print(f"FAILED {name}\n{traceback.format_exc()}", flush=True)
    else:
        torch.cuda.synchronize()
        print(f"  [{name}: {time.monotonic() - began:.1f} s]", flush=True)


def note(**row: Any) -> None:
    """Append one line to the results."""
    append("apollo", row)


def noise(shape: tuple[int, ...], dtype: torch.dtype = BF16, size: float = 1.0) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE).normal_(0, size)


# Correctness


def verify(kind: str, shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> None:
    """Three steps of a bucket of two against float64; bfloat16 by the reference's random words."""
    m, n = shape
    torch.manual_seed(0)
    starts = [noise(shape, dtype) for _ in range(2)]
    given = []
    for _ in range(3):
        if kind == "dense":
            given.append([[noise(shape, dtype) for _ in starts]])
        else:
            given.append([[noise((tokens, k), dtype) for _ in starts] for k in (n, m)])
    found = steps(kernels, kind, [w.clone() for w in starts], given)
    exact = steps(reference, kind, [w.double() for w in starts], given)
    same = steps(reference, kind, [w.clone() for w in starts], given)
    scale = [(w - s.double()).square().sum() for w, s in zip(exact[0], starts, strict=True)]
    off = [(w.double() - e).square().sum() for w, e in zip(found[0], exact[0], strict=True)]
    plain_off = [(w.double() - e).square().sum() for w, e in zip(same[0], exact[0], strict=True)]
    error = max(math.sqrt(a / b) for a, b in zip(off, scale, strict=True))
    reference_error = max(math.sqrt(a / b) for a, b in zip(plain_off, scale, strict=True))
    moment = max(
        float((a.double() - b).norm() / b.norm()) for a, b in zip(found[1], exact[1], strict=True)
    )
    differ = float((found[0][0] != same[0][0]).float().mean())
    # Moments of factored bfloat16 go through Z in bfloat16: 2^-9 an element.
    limit = 1e-2 if kind == "factored" and dtype == BF16 else 1e-4
    good = moment < limit and error < (1e-3 if dtype == torch.float32 else 1.1 * reference_error)
    print(
        f"{'ok ' if good else 'BAD'} {kind:8} {m}x{n} {str(dtype)[6:]:9} change off by {error:.1e}"
        f" (reference {reference_error:.1e}), moments {moment:.1e}, weights differ {differ:.2%}"
    )
    note(case="verify", kind=kind, shape=shape, rank=RANK, dtype=str(dtype), good=good, error=error,
         reference_error=reference_error, moments=moment)  # fmt: skip
    if not good:
        raise SystemExit("Nothing is timed: the kernels do not equal the reference.")


def steps(
    module: Any, kind: str, weights: list[Tensor], given: list[Any]
) -> tuple[list[Tensor], list[Tensor]]:
    wide = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
    (m, n), count = weights[0].shape, len(weights)
    moments = [
        [torch.zeros(max(m, n), RANK, dtype=wide, device=DEVICE) for _ in weights] for _ in "mv"
    ]
    norms = [torch.full((), math.inf, dtype=wide, device=DEVICE) for _ in weights]
    signs = projection(RANK, min(m, n), 0, 0, DEVICE, weights[0].dtype)
    for step, lists in enumerate(given, 1):
        dials = reference.make_dials(1e-2, 0.1, (0.9, 0.999), step, 77 * step, wide).to(DEVICE)
        lists = [[t.to(weights[0].dtype) for t in tensors] for tensors in lists]
        arguments = [weights, *lists, *moments, norms, [5 + i for i in range(count)], signs, dials]
        getattr(module, f"{kind}_step")(*arguments, **RULE)
    return weights, [*moments[0], *moments[1], *norms]


def verify_adamw() -> None:
    shapes = [(4096,), (4096,), (77,), (300, 200)]
    outcome = []
    torch.manual_seed(1)
    starts, grads = ([noise(s) for s in shapes] for _ in range(2))
    for module in (kernels, reference):
        weights = [w.clone() for w in starts]
        m, v = ([torch.zeros(s, device=DEVICE) for s in shapes] for _ in range(2))
        dials = reference.make_dials(1e-2, 0.1, (0.9, 0.999), 1, 99).to(DEVICE)
        module.adamw_step(weights, grads, m, v, [1, 2, 3, 4], dials, **RULE)
        outcome.append(torch.cat([w.flatten() for w in weights]))
    differ = float((outcome[0] != outcome[1]).float().mean())
    print(f"{'ok ' if differ < 0.002 else 'BAD'} adamw    bfloat16 weights differ {differ:.3%}")


# Time


def model(layers: int) -> list[nn.Parameter]:
    return [nn.Parameter(noise(s, size=0.02)) for _ in range(layers) for s in LAYER]


def size_of(layers: int) -> int:
    return layers * sum(m * n for m, n in LAYER)


def moment_bytes(layers: int) -> int:
    """m and v in float32, read and written."""
    return layers * sum(max(shape) * RANK * 16 for shape in LAYER)


def copying() -> float:
    """Bytes that a copy on the device reads and writes in a second: the roof of this card."""
    source = noise((1 << 30,))
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) * 1e3
    print(f"a copy reads and writes {rate / 1e12:.2f} TB/s")
    return rate


def bandwidth() -> float:
    name = torch.cuda.get_device_name()
    return next((rate for key, rate in BANDWIDTH.items() if key in name), 3.35e12)


def milliseconds(call: Callable[[], Any], times: int = 10, warm: int = 3) -> float:
    """Median time of a call by events, its launches included."""
    for _ in range(warm):
        call()
    torch.cuda.synchronize()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def kernel_times(call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of each kernel of ours in one call."""
    from torch.profiler import ProfilerActivity, profile  # loads slowly

    call()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return {
        event.key[:60]: round(event.device_time_total / 1e3, 3)
        for event in sorted(seen.key_averages(), key=lambda e: -e.device_time_total)[:8]
    }


def report(name: str, layers: int, ms: float, bytes_each: float, **more: Any) -> None:
    size, rate = size_of(layers), bandwidth()
    floor = bytes_each * size / rate * 1e3
    print(
        f"{name:28} {ms:8.2f} ms   floor {floor:6.2f} ms ({bytes_each:.2f} B a parameter at "
        f"{rate / 1e12:.2f} TB/s)   {ms / floor:5.2f} times the floor",
        flush=True,
    )
    note(case=name, layers=layers, parameters=size, rank=RANK, ms=ms, floor_ms=floor,
         times_floor=ms / floor, **more)  # fmt: skip


def fused(layers: int) -> float:
    """APOLLO's whole step on gradients in memory."""
    parameters = model(layers)
    for parameter in parameters:
        parameter.grad = noise(tuple(parameter.shape))
    optimizer = Apollo(parameters, lr=1e-5, rank=RANK)
    ms = milliseconds(optimizer.step)
    report("fused", layers, ms, 9)
    with part("no wait for the device in a step"):
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    with part("kernels of the fused step"):
        found = kernel_times(optimizer.step)
        print("   ", found)
        note(case="fused kernels", layers=layers, kernels=found)
    with part("fused, replayed as a CUDA graph"):
        replayed("fused graph", optimizer, layers, 9)
    return ms


def replayed(name: str, optimizer: Apollo, layers: int, bytes_each: float) -> None:
    """The same step as a CUDA graph: GPU time without launches."""
    calls = optimizer.prepare()
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    report(name, layers, milliseconds(graph.replay), bytes_each)


def factored(layers: int, tokens: int) -> None:
    """APOLLO's whole step on factors of the gradients."""
    parameters = model(layers)
    for parameter in parameters:
        m, n = parameter.shape
        setattr(parameter, NAME, Factors([noise((tokens, n))], [noise((tokens, m))]))
    optimizer = Apollo(parameters, lr=1e-5, rank=RANK)
    ms = milliseconds(optimizer.step)
    report(f"factored, {tokens} tokens", layers, ms, 4, tokens=tokens)
    print(f"{'':28} with the moments, which the floor leaves out: "
          f"{4 + moment_bytes(layers) / size_of(layers):.2f} B a parameter")  # fmt: skip
    with part("kernels of the factored step"):
        found = kernel_times(optimizer.step)
        print("   ", found)
        note(case="factored kernels", layers=layers, tokens=tokens, kernels=found)
    with part("factored, replayed as a CUDA graph"):
        replayed(f"factored graph, {tokens} tokens", optimizer, layers, 4)


@torch.no_grad()
def plain_step(weights: list[Tensor], state: list[dict[str, Any]], lr: float, step: int) -> None:
    """APOLLO line by line in PyTorch, bfloat16 rounded to nearest, and no wait for the device."""
    first, second = 1 - 0.9**step, math.sqrt(1 - 0.999**step)
    for weight, kept in zip(weights, state, strict=True):
        G, P = weight.grad, kept["P"]
        assert G is not None
        tall = G.shape[0] >= G.shape[1]
        R = (G @ P.T if tall else P @ G).float()
        m = kept["m"].lerp_(R, 0.1)
        v = kept["v"].mul_(0.999).addcmul_(R, R, value=0.001)
        Q = (m / first) / ((v.sqrt() / second) + 1e-8)
        axis = 1 if tall else 0
        s = Q.norm(dim=axis, keepdim=True) / (R.norm(dim=axis, keepdim=True) + 1e-8)
        U = G * s.to(G.dtype) * math.sqrt(min(G.shape) / RANK)
        norm = U.norm()
        growth = (norm / (kept["norm"] + 1e-8)).clamp_min(1.01) / 1.01
        kept["norm"] = norm / growth
        weight.sub_(U / growth * lr)


def plain(layers: int, dense_ms: float | None) -> None:
    """The same step in plain PyTorch, once as the paper has it and once as our reference does."""
    parameters = model(layers)
    state = []
    for parameter in parameters:
        m, n = parameter.shape
        parameter.grad = noise((m, n))
        shape = (m, RANK) if m >= n else (RANK, n)
        state.append({
            "P": noise((RANK, min(m, n)), size=RANK**-0.5),
            "m": torch.zeros(shape, device=DEVICE),
            "v": torch.zeros(shape, device=DEVICE),
            "norm": torch.full((), math.inf, device=DEVICE),
        })  # fmt: skip
    ms = milliseconds(lambda: plain_step(parameters, state, 1e-5, 10), times=5, warm=2)  # pyright: ignore[reportArgumentType]
    report("plain PyTorch, nearest", layers, ms, 9)
    if dense_ms:
        print(f"{'':28} the fused step is {ms / dense_ms:.2f} times as fast")
        note(case="plain / fused", layers=layers, ratio=ms / dense_ms)
    state.clear()
    torch.cuda.empty_cache()
    with part("torch's fused AdamW"):
        adamw = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, fused=True)
        report("fused AdamW, bf16 moments", layers, milliseconds(adamw.step, times=5, warm=2), 14)
        del adamw
    torch.cuda.empty_cache()
    with part("reference with stochastic rounding"):
        import workbench.train.apollo as module  # to take its kernels away

        chosen = module.steps_for
        module.steps_for = lambda *_: reference  # pyright: ignore[reportAttributeAccessIssue]
        try:
            optimizer = Apollo(parameters, lr=1e-5, rank=RANK)
            report("reference, stochastic", layers, milliseconds(optimizer.step, 2, 1), 9)
        finally:
            module.steps_for = chosen


# Launch parameters


def tune(layers: int, deadline: float) -> None:
    """Time Triton's kernels with other launch parameters, one changed at a time, on fewer layers."""
    kernels._hopper = lambda _: None  # pyright: ignore[reportAttributeAccessIssue]
    parameters = model(layers)
    jobs = {"dense": Apollo(parameters, lr=1e-5, rank=RANK)}
    jobs["factored"] = Apollo(parameters, lr=1e-5, rank=RANK)
    for kernel, others in OTHERS.items():
        name = "dense" if kernel in ("project", "move") else "factored"
        give(parameters, name)
        inuse = kernels.TILES[kernel]
        for tile in [inuse, *others]:
            if time.monotonic() > deadline:
                print("tuning ends here: no time is left")
                return
            kernels.TILES[kernel] = tile
            try:
                ms = milliseconds(jobs[name].step, times=6, warm=2)
            except Exception as error:
                print(f"  {kernel} {tile}: {str(error).splitlines()[0][:120]}")
                continue
            finally:
                kernels.TILES[kernel] = inuse
            mark = " (in use)" if tile is inuse else ""
            print(f"  {name} step {ms:7.3f} ms, {layers} layers: {kernel} {tile}{mark}", flush=True)
            note(case="tune", kernel=kernel, tile=tile, step_ms=ms, layers=layers)


def give(parameters: list[nn.Parameter], kind: str) -> None:
    for parameter in parameters:
        m, n = parameter.shape
        if kind == "dense" and parameter.grad is None:
            parameter.grad = noise((m, n))
        elif kind == "factored":
            parameter.grad = None
            if not hasattr(parameter, NAME):
                setattr(parameter, NAME, Factors([noise((256, n))], [noise((256, m))]))
