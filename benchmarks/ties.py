"""TIES of three 135M bf16 fine-tunes out of core, against the disk's bound and a full argsort.

    workbench bench ties [--json] [--repeats 5] [--small] [--folder DIR] [--results FOLDER]

Checkpoints of SmolLM2-135M's shapes are made in a temporary folder: weights of standard deviation
0.02, changes of 0.002. Bound, first merge and second merge are timed in turn, best of the repeats,
page cache warm, compiled code loaded, digests known, nothing flushed to the disk in any of them.
The bound reads the same bytes in the same parts on the same threads, writes as many, and computes
nothing. The second merge has another density, weight and sign rule, and the histograms of the
first. Then both merges are compared with the plain way element by element, the first with a full
argsort; if one element differs, the benchmark fails.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _results import RESULTS, publish
from safetensors.torch import load_file, save_file

from vectors.store import Checkpoint
from vectors.tasks import parts, streams
from vectors.tasks.memo import FolderMemo
from vectors.tasks.recipes import Operation
from vectors.tasks.sources import FolderTerm
from vectors.tasks.weights import write_weights

KEYS = ("a", "b", "c")
FIRST = ({"density": 0.2}, (1.0, 1.0, 1.0))
SECOND = ({"density": 0.35, "vote": "count", "zero_sum": "positive"}, (1.0, -0.5, 0.8))
MIB = 1 << 20


def main() -> None:
    """Make the checkpoints, compare, time, and publish."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--small", action="store_true", help="a tiny model: proves, times nothing")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the checkpoints go while it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to append to")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        numbers = measure(Path(folder), small=asked.small, repeats=asked.repeats)
    publish("ties", numbers, as_json=asked.json, results=asked.results)
    if numbers["mismatches"]:
        raise SystemExit("The fast way and the argsort way differ; do not trust these times.")


def measure(folder: Path, *, small: bool, repeats: int) -> dict[str, Any]:
    """Return the numbers; only those of the fast way, taken before the argsort, count as memory."""
    for seed, name in enumerate(("base", *KEYS)):
        make(folder / name, seed, small=small)
    checkpoint = Checkpoint(folder / "base")
    elements = sum(s.end - s.start for f in checkpoint.files for s in f.slots) // 2
    merge(folder, checkpoint, FIRST, fresh=True)  # loads what is compiled
    reset_peak()
    say("timing the fast way")
    times: dict[str, list[float]] = {"bound": [], "first": [], "second": []}
    for _ in range(repeats):
        times["bound"].append(timed(folder, lambda: bound(folder, checkpoint)))
        times["first"].append(timed(folder, lambda: merge(folder, checkpoint, FIRST, fresh=True)))
        times["second"].append(timed(folder, lambda: merge(folder, checkpoint, SECOND)))
    peak = peak_mib()
    best = {name: min(rows) for name, rows in times.items()}
    say(
        ", ".join(f"{name} {seconds:.3f} s" for name, seconds in best.items()) + f", {peak:.0f} MiB"
    )
    mismatches, argsort = 0, 0.0
    for how in (FIRST, SECOND):
        merge(folder, checkpoint, how)
        found = load_file(folder / "out" / "model.safetensors")
        say(f"comparing {how}")
        start = time.perf_counter()
        expected = plainly(folder, *how, sort=how is FIRST)
        argsort = argsort or time.perf_counter() - start
        mismatches += sum(int((found[n] != expected[n]).sum()) for n in expected)
    return {
        "ratio_to_bound": best["first"] / best["bound"],
        "second_ratio_to_bound": best["second"] / best["bound"],
        "speedup_vs_argsort": argsort / best["first"],
        "peak_mib": peak,
        "mismatches": mismatches,
        "elements": elements,
        "bound_s": best["bound"],
        "first_s": best["first"],
        "second_s": best["second"],
        "argsort_s": argsort,
        "repeats": repeats,
    }


def make(folder: Path, seed: int, *, small: bool) -> None:
    """Write a checkpoint of SmolLM2-135M's shapes; seed 0 is the base, others are tuned from it."""
    folder.mkdir()
    width, hidden, keys, words, layers = (
        (24, 40, 8, 500, 2) if small else (576, 1536, 192, 49152, 30)
    )
    shapes = {"model.embed_tokens.weight": (words, width), "model.norm.weight": (width,)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name, shape in (
            ("self_attn.q_proj", (width, width)),
            ("self_attn.k_proj", (keys, width)),
            ("self_attn.v_proj", (keys, width)),
            ("self_attn.o_proj", (width, width)),
            ("mlp.gate_proj", (hidden, width)),
            ("mlp.up_proj", (hidden, width)),
            ("mlp.down_proj", (width, hidden)),
            ("input_layernorm", (width,)),
            ("post_attention_layernorm", (width,)),
        ):
            shapes[f"{at}{name}.weight"] = shape
    rng = torch.Generator().manual_seed(seed)
    if seed == 0:
        state = {n: (0.02 * torch.randn(s, generator=rng)).bfloat16() for n, s in shapes.items()}
    else:
        state = load_file(folder.with_name("base") / "model.safetensors")
        for name, tensor in state.items():
            noise = torch.randn(tensor.shape, generator=rng)
            state[name] = noise.mul_(0.002).add_(tensor).bfloat16()
    save_file(state, folder / "model.safetensors")


def merge(
    folder: Path,
    checkpoint: Checkpoint,
    how: tuple[dict[str, Any], Sequence[float]],
    *,
    fresh: bool = False,
) -> None:
    """The fast way: what materialising a recipe runs."""
    kept, out = folder / "kept", folder / "out"
    if fresh:
        shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    options, weights = how
    terms = [FolderTerm(key, folder / key, checkpoint) for key in KEYS]
    op = Operation.of("ties", options)
    for _ in write_weights(checkpoint, terms, weights, op, out, FolderMemo(kept)):
        pass
    for term in terms:
        term.close()


def bound(folder: Path, checkpoint: Checkpoint) -> None:
    """Read base and fine-tunes, write one file; on all cores, in the same parts."""
    terms = [FolderTerm(key, folder / key, checkpoint) for key in KEYS]
    walk = parts.Walk(checkpoint, terms)
    (file,) = checkpoint.files
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    with walk.reader, (out / "model.safetensors").open("xb", buffering=0) as opened:
        opened.write(file.header)

        def work(span: parts.Span) -> None:
            for part in walk.parts(span, range(len(terms))):
                streams.write_at(opened.fileno(), part.base, span.slot.start + 2 * part.start)

        for _ in parts.on_all_cores(work, parts.spans_of(file.slots, whole=False)):
            pass
    for term in terms:
        term.close()


def plainly(
    folder: Path, options: dict[str, Any], weights: Sequence[float], *, sort: bool
) -> dict[str, torch.Tensor]:
    """The plain way: every fine-tune flat, sorted, masked, all in memory.

    Without `sort`, the threshold comes from a selection, where only the numbers are wanted.
    """
    base = load_file(folder / "base" / "model.safetensors")
    flat = torch.cat([base[n].reshape(-1) for n in sorted(base)]).float()
    votes, values, count = torch.zeros_like(flat), [], torch.zeros_like(flat)
    for key, weight in zip(KEYS, weights, strict=True):
        tuned = load_file(folder / key / "model.safetensors")
        change = torch.cat([tuned[n].reshape(-1) for n in sorted(base)]).float() - flat
        size = change.abs()
        rank = int(options["density"] * len(size))
        if sort:
            smallest = size[torch.argsort(size, descending=True)[rank - 1]]
        else:
            smallest = size.kthvalue(len(size) - rank + 1).values
        value = torch.where(size >= smallest, change, 0.0) * weight
        votes += value.sign() if options.get("vote") == "count" else value
        values.append(value)
    sign = votes.sign()
    if options.get("zero_sum") == "positive":
        sign[sign == 0] = 1.0
    total = torch.zeros_like(flat)
    for value in values:
        agrees = value * sign > 0
        total += torch.where(agrees, value, 0.0)
        count += agrees
    merged = flat + torch.where(count > 0, total / count, 0.0)
    sizes = [base[n].numel() for n in sorted(base)]
    split = zip(sorted(base), merged.bfloat16().split(sizes), strict=True)
    return {n: x.reshape(base[n].shape) for n, x in split}


def timed(folder: Path, work: Callable[[], None]) -> float:
    """Seconds that `work` takes, writing to a folder that is empty."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def say(words: str) -> None:
    """Tell a person who waits, beside the numbers."""
    print(words, file=sys.stderr, flush=True)


def reset_peak() -> None:
    """Forget the most memory that the process has had."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """The most memory since `reset_peak`, the interpreter and its libraries included."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    found = next(line for line in lines if line.startswith("VmHWM"))
    return int(found.split()[1]) * 1024 / MIB


if __name__ == "__main__":
    main()
