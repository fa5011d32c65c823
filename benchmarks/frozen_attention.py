"""Frozen-prefix attention against scaled_dot_product_attention with joined keys, on a CUDA device.

    PYTHONPATH=.:kernels python benchmarks/frozen_attention.py [--prefix 32768] [--decision 256]
        [--heads 32] [--groups 8] [--width 128] [--sweep]

First the kernels are compared with the reference in float64 for widths 64, 128 and 256, unequal
lengths and padding that is not a number; then forward and backward are timed. `--sweep` times other
tiles too, one kernel at a time, and says which are best; a tile that does not fit is skipped.
Appends a line to `benchmarks/results/frozen_attention.jsonl`. Exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from _kernels import ceilings, error, graph_ms, median_ms, part, peak_mib, record
from steer_kernels import attention_reference, attention_triton
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

LIMIT = 1e-2
TILES = {
    "forward": [
        (128, 128, 8, 2, 1),
        (128, 64, 8, 2, 1),
        (128, 64, 8, 3, 1),
        (128, 64, 8, 4, 1),
        (64, 64, 4, 2, 2),
        (64, 128, 4, 2, 1),
        (64, 32, 4, 3, 1),
    ],
    "query": [
        (128, 64, 8, 2, 1),
        (128, 64, 8, 3, 1),
        (128, 32, 8, 3, 1),
        (64, 64, 4, 2, 2),
        (64, 64, 4, 3, 1),
        (64, 32, 4, 3, 2),
    ],
    "key_value": [(64, 64, 8, 1), (64, 64, 4, 1), (32, 64, 4, 1), (64, 32, 4, 1), (64, 32, 8, 1)],
}
Step = Callable[[], list[Tensor]]


def main() -> int:
    asked = arguments()
    torch.manual_seed(0)
    numbers: dict[str, Any] = dict(vars(asked))
    wrong = verify()
    numbers["errors"] = wrong
    with part("ceilings"):
        rate, bandwidth = ceilings()
        numbers |= {"bf16_tflops": rate / 1e12, "copy_gb_s": bandwidth / 1e9}
        numbers |= floors(asked, rate, bandwidth)
    own, prefix, gradient = tensors(
        (1, asked.heads, asked.groups, asked.decision, asked.prefix, asked.width)
    )
    with part("large shape against float32"):
        found = step(attention_triton.frozen_prefix_attention, own, prefix, gradient)()
        wide = [[x.float() for x in group] for group in (own, prefix)]
        true = step(attention_reference.frozen_prefix_attention, *wide, gradient.float())()
        numbers["errors"]["large"] = worst(found, true)
        del true, wide
    if asked.sweep:
        for kernel in TILES:
            sweep(kernel, asked.width, own, prefix, gradient, numbers)
    with part("kernels"):
        measure("kernels", attention_triton.frozen_prefix_attention, own, prefix, gradient, numbers)
    with part("SDPA, joined keys, causal_lower_right"):
        measure("sdpa", joined, own, prefix, gradient, numbers)
    with part("SDPA, joined keys, dense mask (as transformers)"):
        measure("sdpa_mask", masked, own, prefix, gradient, numbers)
    record("frozen_attention", numbers)
    return any(not e < LIMIT for e in numbers["errors"].values())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    defaults = {"prefix": 32768, "decision": 256, "heads": 32, "groups": 8, "width": 128}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--sweep", action="store_true")
    return parser.parse_args()


def tensors(
    shape: tuple[int, int, int, int, int, int], dtype: torch.dtype = torch.bfloat16
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Queries, keys, values as models lay them out; prefix keys, values; and a gradient."""
    rows, heads, groups, width, prefix, wide = shape
    options: Any = {"device": "cuda", "dtype": dtype}
    own = [torch.randn(rows, width, n, wide, **options) for n in (heads, groups, groups)]
    frozen = [torch.randn(rows, groups, prefix, wide, **options) for _ in range(2)]
    gradient = torch.randn(rows, width, heads, wide, **options).transpose(1, 2)
    return [x.transpose(1, 2) for x in own], frozen, gradient


def step(
    function: Callable[..., Tensor],
    own: list[Tensor],
    prefix: list[Tensor],
    gradient: Tensor,
    *rest,
) -> Step:
    """One forward and backward pass, which returns the output and the three gradients."""
    leaves = [x.detach().requires_grad_() for x in own]

    def run() -> list[Tensor]:
        out = function(*leaves, *prefix, *rest)
        return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]

    return run


def verify() -> dict[str, float]:
    """Compare with float64 at odd shapes; what is worst of output and gradients, by width."""
    errors = {}
    for wide in (64, 128, 256):
        with part(f"verify, width {wide}"):
            errors[f"width_{wide}"] = float("nan")
            own, prefix, gradient = tensors((2, 8, 2, 77, 1003, wide))
            prefix_lengths = torch.tensor([1003, 259], device="cuda")
            lengths = torch.tensor([50, 77], device="cuda")
            for b in range(2):
                for x in own:
                    x[b, :, lengths[b] :] = float("nan")
                for x in prefix:
                    x[b, :, : 1003 - prefix_lengths[b]] = float("nan")
            sizes = (prefix_lengths, lengths)
            found = step(attention_triton.frozen_prefix_attention, own, prefix, gradient, *sizes)()
            wide_own, wide_prefix = ([x.double() for x in group] for group in (own, prefix))
            true = step(
                attention_reference.frozen_prefix_attention,
                wide_own,
                wide_prefix,
                gradient.double(),
                *sizes,
            )()
            errors[f"width_{wide}"] = worst(found, true)
            print({n: error(a, b) for n, a, b in zip("oqkv", found, true, strict=True)})
    return errors


def worst(found: list[Tensor], true: list[Tensor]) -> float:
    errors = [error(a, b) for a, b in zip(found, true, strict=True)]
    return float("nan") if any(e != e for e in errors) else max(errors)


def floors(asked: argparse.Namespace, rate: float, bandwidth: float) -> dict[str, float]:
    """Least times by operations (5 products with the prefix, 7 with the decision) and by bytes."""
    pairs = asked.heads * asked.decision * 2 * asked.width
    operations = pairs * (5 * asked.prefix + 7 * asked.decision / 2)
    prefix_bytes = 2 * 2 * asked.groups * asked.prefix * asked.width
    return {
        "floor_operations_ms": operations / rate * 1e3,
        "floor_bytes_ms": 2 * prefix_bytes / bandwidth * 1e3,
    }


def joined(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    keys, values = torch.cat([prefix_k, k], dim=2), torch.cat([prefix_v, v], dim=2)
    mask: Any = causal_lower_right(q.shape[2], keys.shape[2])
    return scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)


def masked(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    share = q.shape[1] // k.shape[1]
    keys, values = (
        torch.cat(pair, dim=2).repeat_interleave(share, dim=1)
        for pair in ((prefix_k, k), (prefix_v, v))
    )
    mask = torch.ones(q.shape[2], keys.shape[2], dtype=torch.bool, device=q.device)
    mask = mask.tril(prefix_k.shape[2])
    return scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def measure(
    name: str,
    function: Callable[..., Tensor],
    own: list[Tensor],
    prefix: list[Tensor],
    gradient: Tensor,
    numbers: dict[str, Any],
) -> None:
    """Time forward, and forward with backward, eagerly and in a graph; and the peak of memory."""
    run = step(function, own, prefix, gradient)
    with torch.no_grad():
        numbers[f"{name}_forward_ms"] = median_ms(lambda: function(*own, *prefix))
    numbers[f"{name}_ms"] = median_ms(run)
    numbers[f"{name}_peak_mib"] = peak_mib(run)
    if "floor_operations_ms" in numbers:
        floor = max(numbers["floor_operations_ms"], numbers["floor_bytes_ms"])
        numbers[f"{name}_over_floor"] = numbers[f"{name}_ms"] / floor
    print({key: value for key, value in numbers.items() if key.startswith(name)}, flush=True)
    numbers[f"{name}_graph_ms"] = graph_ms(run)


def sweep(
    kernel: str,
    width: int,
    own: list[Tensor],
    prefix: list[Tensor],
    gradient: Tensor,
    numbers: dict[str, Any],
) -> None:
    """Time one kernel's tiles, forward alone or backward alone, and keep the best."""
    tiles = attention_triton.TILES[kernel]
    times: dict[tuple[int, ...], float] = {}
    for cut in TILES[kernel]:
        tiles[max(width, 64)] = attention_triton.Tile(*cut)
        with part(f"sweep {kernel} {cut}"):
            leaves = [x.detach().requires_grad_() for x in own]
            out = attention_triton.frozen_prefix_attention(*leaves, *prefix)

            def once(out: Tensor = out, leaves: list[Tensor] = leaves) -> Any:
                if kernel == "forward":
                    return attention_triton.frozen_prefix_attention(*leaves, *prefix)
                return torch.autograd.grad(out, leaves, gradient, retain_graph=True)

            times[cut] = median_ms(once)
            print(f"{times[cut]:.4f} ms", flush=True)
    if times:
        best = min(times, key=times.__getitem__)
        tiles[max(width, 64)] = attention_triton.Tile(*best)
        numbers[f"sweep_{kernel}"] = {str(cut): round(time, 4) for cut, time in times.items()}


if __name__ == "__main__":
    sys.exit(main())
