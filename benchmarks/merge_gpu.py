"""TIES of three 8B bf16 fine-tunes on a CUDA device, from pinned host memory onto a resident base.

    workbench bench merge-gpu [--json] [--small | --files] [--layers 32] [--distinct 32]
                              [--repeats 3] [--results FOLDER]

First a small model is merged from files both ways, with several options and with everything, the
base, or nothing held on the device: every byte must be the processor's. Then Llama-3-8B's shapes:
weights of standard deviation 0.02 on the device, three fine-tunes with changes of 0.002 in pinned
memory (`--distinct` layers of their own, the others share them in turn). A merge is timed from the
first copy until the merged weights are on the device: what the bus carries is compared with one
large pinned copy measured in the same run. The cut is proven by counting, and every merged element
compared with plain PyTorch. The kernel alone is timed in a CUDA graph and compared with its floor,
each byte read and written once at the measured copy bandwidth. The plain way on the same device
sorts: for each tensor of one layer, `kthvalue` of each term, masks, election.

`--files` times a 135M model from files to a file instead, on the processor and on the device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from _kernels import ceilings, graph_ms
from _results import RESULTS, publish
from steer_kernels import merge as kernels
from ties import KEYS, make
from torch import Tensor

from vectors.store.checkpoint import Checkpoint
from vectors.tasks.election import rules
from vectors.tasks.methods.ties import TiesParameters
from vectors.tasks.recipes import Operation
from vectors.tasks.sources import FolderTerm
from vectors.tasks.streams import WHOLE
from vectors.tasks.trim import rank_of
from vectors.tasks.weights import write_weights
from workbench.merging import ties
from workbench.merging.choose import Merging
from workbench.merging.linear import DeviceSum

DEVICE = torch.device("cuda")
WEIGHTS = (1.0, 1.0, 1.0)
PART = 1 << 26
LAYER = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
    "input_layernorm": (4096,),
    "post_attention_layernorm": (4096,),
}
ENDS = {"model.embed_tokens": (128256, 4096), "model.norm": (4096,), "lm_head": (128256, 4096)}
CHECKS: list[tuple[dict[str, Any], tuple[float, ...]]] = [
    ({"density": 0.2}, (1.0, 1.0, 1.0)),
    ({"density": 0.35, "vote": "count", "zero_sum": "positive"}, (1.0, -0.5, 0.8)),
    ({"scope": "tensor", "zero_sum": "majority", "divisor": "weights"}, (1.0, -0.5, 0.8)),
    ({"combine": "max", "election": "unweighted", "scale": -0.3}, (1.0, -0.5, 0.8)),
]


def main() -> None:
    """Verify, time, and publish."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--small", action="store_true", help="verify alone, time nothing")
    parser.add_argument("--files", action="store_true", help="a 135M model from files, both ways")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--distinct", type=int, default=32, help="layers with memory of their own")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--span", type=int, default=1 << 30, help="elements that go at a time")
    parser.add_argument("--threads", type=int, default=2, help="that ask for copies")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to append to")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This benchmark needs a CUDA device, and PyTorch finds none.")
    with tempfile.TemporaryDirectory() as folder:
        numbers: dict[str, Any] = {"mismatched_bytes": verify(Path(folder) / "small")}
        if asked.files:
            numbers |= from_files(Path(folder) / "files")
        elif not asked.small:
            say(f"verified; {numbers}")
            ties.DeviceTies.span, ties.DeviceTies.threads = asked.span, asked.threads
            numbers |= measure(Path(folder), asked.layers, asked.distinct, asked.repeats)
    publish("merge-gpu", numbers, as_json=asked.json, results=asked.results)
    if numbers["mismatched_bytes"] or numbers.get("mismatches") or not numbers.get("cut", True):
        raise SystemExit("The device's way and the plain way differ; do not trust these times.")


def verify(folder: Path) -> int:
    """Merge a small model from files on the device and on the processor; count bytes that differ."""
    folder.mkdir()
    for seed, name in enumerate(("base", *KEYS)):
        make(folder / name, seed, small=True)
    checkpoint = Checkpoint(folder / "base")
    terms = [FolderTerm(key, folder / key, checkpoint) for key in KEYS]
    wrong = 0
    for options, weights in CHECKS:
        want = _written(folder, write_weights, checkpoint, terms, weights, options)
        for held in ("all", "base", "none"):
            merge = ties.DeviceTies(
                checkpoint, terms, weights, TiesParameters(**options), None, DEVICE, held
            )
            wrong += _differing(want, _written(folder, lambda *_, m=merge: m.write(_[4])))
    want = _written(folder, write_weights, checkpoint, terms, (1.0, -0.5, 0.8), None)
    merge = DeviceSum(checkpoint, terms, (1.0, -0.5, 0.8), DEVICE)
    wrong += _differing(want, _written(folder, lambda *_: merge.write(_[4])))
    return wrong


def from_files(folder: Path) -> dict[str, float]:
    """Seconds of a 135M model's merge from files to a file, both ways, best of three."""
    folder.mkdir()
    for seed, name in enumerate(("base", *KEYS)):
        make(folder / name, seed, small=False)
    checkpoint = Checkpoint(folder / "base")
    terms = [FolderTerm(key, folder / key, checkpoint) for key in KEYS]
    op = Operation.of("ties", {"density": 0.2})
    best = {"files_cpu_s": float("inf"), "files_device_s": float("inf")}
    for _ in range(3):
        for name, setting in (("files_cpu_s", "cpu"), ("files_device_s", "cuda")):
            with tempfile.TemporaryDirectory(dir=folder) as out:
                start = time.perf_counter()
                write = Merging(setting).write_weights
                for _ in write(checkpoint, terms, WEIGHTS, op, Path(out)):
                    pass
                best[name] = min(best[name], time.perf_counter() - start)
    say(f"{best}")
    return best


def _written(folder: Path, write: Any, *rest: Any) -> bytes:
    """The bytes of the file that `write` makes."""
    checkpoint, terms, weights, options = rest or (None,) * 4
    op = Operation.of("linear", {}) if options is None else Operation.of("ties", options)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        for _ in write(checkpoint, terms, weights, op, Path(out)):
            pass
        return (Path(out) / "model.safetensors").read_bytes()


def _differing(want: bytes, found: bytes) -> int:
    if len(want) != len(found):
        return max(len(want), len(found))
    return int((_bytes(want) != _bytes(found)).sum())


def _bytes(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


class PinnedTerm:
    """A fine-tune in pinned host memory."""

    whole = False

    def __init__(self, key: str, tensors: dict[str, Tensor]) -> None:
        self.key, self._tensors = key, tensors

    def changes(self, name: str) -> bool:
        """True: all weights were changed."""
        return True

    def held(self, name: str) -> Tensor:
        """The tensor where it is pinned."""
        return self._tensors[name]

    def tensor(self, name: str, base: Tensor) -> Tensor:
        """The tensor."""
        return self._tensors[name]

    def into(self, name: str, start: int, out: Any) -> None:
        """Fill `out` with the tensor's bytes from `start`."""
        raw = self._tensors[name].reshape(-1).view(torch.uint8).numpy()
        out[:] = raw[start : start + len(out)]

    def close(self) -> None:
        """Nothing to let go of."""


def measure(folder: Path, layers: int, distinct: int, repeats: int) -> dict[str, Any]:
    """Return the numbers of the large merge."""
    shapes = {f"{name}.weight": shape for name, shape in ENDS.items()}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{n}.weight": shape for n, shape in LAYER.items()}
    elements = sum(torch.Size(shape).numel() for shape in shapes.values())
    _, copy = ceilings()
    bus = bus_bandwidth()
    say(f"copy {copy / 1e9:.0f} GB/s, bus {bus / 1e9:.1f} GB/s, {elements / 1e9:.2f}e9 elements")
    start = time.perf_counter()
    base, tuned = weights_of(shapes, distinct)
    say(f"weights made and pinned in {time.perf_counter() - start:.1f} s")
    checkpoint = hollow(folder / "hollow", shapes)
    terms = [PinnedTerm(key, tensors) for key, tensors in zip(KEYS, tuned, strict=True)]
    options: Any = Operation.of("ties", {"density": 0.2}).parameters
    seconds: list[float] = []
    counting: list[float] = []
    for _ in range(repeats - 1):
        # What it held is free again before the next begins.
        took = timed(checkpoint, terms, options, base)[2:]
        seconds.append(took[1])
        counting.append(took[0])
    merge, cuts, *took = timed(checkpoint, terms, options, base)
    seconds.append(took[1])
    counting.append(took[0])
    best = min(seconds)
    crossed, held = merge.crossing.crossed, merge.crossing.held
    merged = merge.crossing.tensors_of(0)
    right, mismatches = check(base, tuned, merged, cuts[WHOLE], options, elements)
    say(f"cut is right: {right}, {mismatches} elements differ")
    kernel = kernel_ms(cuts[WHOLE], merge)
    floor = 2 * elements * (len(KEYS) + 2) / copy * 1e3
    del merge, merged, cuts
    torch.cuda.empty_cache()
    plain_seconds, plain_elements = plainly(base, tuned, options)
    return {
        "share_of_bus": crossed / best / bus,
        "kernel_to_floor": kernel / floor,
        "speedup_vs_plain": (elements / best) / (plain_elements / plain_seconds),
        "cut": right,
        "mismatches": mismatches,
        "elements": elements,
        "terms": len(KEYS),
        "distinct_layers": min(distinct, layers),
        "held": held,
        "merge_s": best,
        "merge_median_s": statistics.median(seconds),
        "cuts_s": min(counting),
        "crossed_bytes": crossed,
        "merge_bytes_per_s": crossed / best,
        "bus_bytes_per_s": bus,
        "copy_bytes_per_s": copy,
        "kernel_ms": kernel,
        "floor_ms": floor,
        "plain_s": plain_seconds,
        "plain_elements": plain_elements,
        "repeats": repeats,
        "span": merge_span(),
    }


def timed(
    checkpoint: Checkpoint, terms: Sequence[Any], options: Any, base: dict[str, Tensor]
) -> tuple[ties.DeviceTies, Any, float, float]:
    """A merge, its cuts, and the seconds until these were known and until it was done."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    merge = ties.DeviceTies(checkpoint, terms, WEIGHTS, options, None, DEVICE, None, base)
    cuts = merge.cuts()
    known = time.perf_counter() - start
    merge.merged_everywhere(cuts)
    torch.cuda.synchronize()
    done = time.perf_counter() - start
    say(f"merged in {done:.3f} s, cuts known after {known:.3f} s")
    return merge, cuts, known, done


def merge_span() -> int:
    """Elements that go at a time."""
    return int(ties.DeviceTies.span or 0)


def bus_bandwidth() -> float:
    """Bytes a second of one pinned copy of 2 GiB to the device, best of three."""
    host = torch.empty(1 << 31, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=DEVICE)
    best = float("inf")
    for _ in range(4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        there.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return host.nbytes / best


def weights_of(
    shapes: dict[str, Sequence[int]], distinct: int
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The base on the device, and its fine-tunes in pinned memory."""
    rng = torch.Generator(DEVICE).manual_seed(0)
    base: dict[str, Tensor] = {}
    tuned: list[dict[str, Tensor]] = [{} for _ in KEYS]
    for name, shape in shapes.items():
        twin = _twin(name, distinct)
        if twin != name:
            base[name] = base[twin].clone()
            for tensors in tuned:
                tensors[name] = tensors[twin]
            continue
        noise = torch.empty(shape, dtype=torch.float32, device=DEVICE)
        base[name] = noise.normal_(0, 0.02, generator=rng).bfloat16()
        for tensors in tuned:
            changed = noise.normal_(0, 0.002, generator=rng).add_(base[name]).bfloat16()
            tensors[name] = torch.empty(shape, dtype=torch.bfloat16, pin_memory=True)
            tensors[name].copy_(changed, non_blocking=True)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return base, tuned


def _twin(name: str, distinct: int) -> str:
    """The tensor whose memory this one has."""
    parts = name.split(".")
    if parts[1] == "layers":
        parts[2] = str(int(parts[2]) % distinct)
    return ".".join(parts)


def hollow(folder: Path, shapes: dict[str, Sequence[int]]) -> Checkpoint:
    """A checkpoint with a header and a hole where weights would be; they are in memory."""
    folder.mkdir()
    at, rows = 0, {}
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        rows[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(rows).encode()
    header += b" " * (-len(header) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + at)
    return Checkpoint(folder)


def check(
    base: dict[str, Tensor],
    tuned: Sequence[dict[str, Tensor]],
    merged: dict[str, Tensor],
    cuts_K: Any,
    options: TiesParameters,
    elements: int,
) -> tuple[bool, int]:
    """Whether each cut has its rank in the whole model, and how many elements differ from PyTorch's."""
    cuts = torch.from_numpy(cuts_K).view(torch.float32).tolist()
    above, least = [0] * len(cuts), [0] * len(cuts)
    wrong = 0
    for name, old in base.items():
        for start in range(0, old.numel(), PART):
            here = slice(start, start + PART)
            wide = old.reshape(-1)[here].float()
            votes = torch.zeros_like(wide)
            kept: list[Tensor] = []
            for k, cut in enumerate(cuts):
                change = tuned[k][name].reshape(-1)[here].to(DEVICE).float() - wide
                above[k] += int((change.abs() > cut).sum())
                least[k] += int((change.abs() >= cut).sum())
                kept.append(torch.where(change.abs() >= cut, change, 0.0))
                votes += kept[-1]
            mean = agreed(kept, votes.sign())
            want = torch.where(mean == 0, old.reshape(-1)[here], (wide + mean).bfloat16())
            wrong += int((merged[name][here] != want.view(torch.int16)).sum())
    rank = rank_of(options.density, elements, options.rank)
    right = all(a < rank <= b for a, b in zip(above, least, strict=True))
    return right, wrong


def agreed(values: Sequence[Tensor], sign: Tensor) -> Tensor:
    """The mean of the values that have the sign."""
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for value in values:
        agrees = value * sign > 0
        total += torch.where(agrees, value, 0.0)
        count += agrees
    return torch.where(count == 0, 0.0, total / count)


def kernel_ms(cuts_K: Any, merge: ties.DeviceTies) -> float:
    """Milliseconds of the merge alone, over everything that is on the device."""
    rule = rules(WEIGHTS, merge.options, None)
    given = (cuts_K.view("float32"), rule.ballots_K, rule.gains_K, rule.amounts_K)
    cuts, ballots, gains, amounts = (torch.from_numpy(x).to(DEVICE) for x in given)
    rows = list(_rows(merge))

    def all_of_it() -> None:
        for base_P, tuned_KP in rows:
            kernels.fuse_bf16(
                base_P, tuned_KP, cuts, ballots, gains, amounts, 0.0, False, False, 0.0, 1.0,
                tuned_KP[0], None, (True, True, True),
            )  # fmt: skip

    return graph_ms(all_of_it)


def _rows(merge: ties.DeviceTies) -> Iterator[tuple[Tensor, Tensor]]:
    for span in merge.spans:
        # The first term was merged over and comes again.
        for part in merge.crossing.parts(span, range(len(KEYS))):
            yield part.base_P, part.tuned_KP
    torch.cuda.synchronize()


def plainly(
    base: dict[str, Tensor], tuned: list[dict[str, Tensor]], options: TiesParameters
) -> tuple[float, int]:
    """Seconds and elements of the plain way, over one layer: a threshold for each tensor."""
    names = [name for name in base if name.startswith("model.layers.0.")]
    start = 0.0
    for name in (names[1], *names):
        if name == names[0]:
            torch.cuda.synchronize()
            start = time.perf_counter()
        wide = base[name].float().reshape(-1)
        values: list[Tensor] = []
        for tensors in tuned:
            change = tensors[name].to(DEVICE, non_blocking=True).float().reshape(-1) - wide
            size = change.abs()
            rank = rank_of(options.density, size.numel(), options.rank)
            smallest = size.kthvalue(size.numel() - rank + 1).values
            values.append(torch.where(size >= smallest, change, 0.0))
        (wide + agreed(values, sum(values, torch.zeros_like(wide)).sign())).bfloat16()
    torch.cuda.synchronize()
    return time.perf_counter() - start, sum(base[name].numel() for name in names)


def say(words: str) -> None:
    """Tell a person who waits, beside the numbers."""
    print(words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
