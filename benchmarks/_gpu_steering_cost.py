"""What steering costs in real vLLM on a CUDA device: GPU time of a decode step, host time, tokens a second.

    python benchmarks/_gpu_steering_cost.py [--starts "1.5B,8B;1.5B"] [--ways baseline,plugin]
                                            [--prefix-cache] [--cells 1:0,32:32]
                                            [--fresh] [--kernels] [--results FOLDER]

A start of a shape is a process of each way. Those between semicolons of `--starts` live at once and take
turns, cell by cell, so that plugin and baseline alternate under the same conditions. A process measures
the replay of the decode graph (CUDA events behind a short sleep, so that no launch is in it), the host's
part (`prepare_inputs` of the model state, where the plugin works), and whole calls by the clock.

vLLM keeps what it compiled, and Inductor chooses among kernels by timing them, which processes beside it
disturb: two compilations of the same code differ by more than steering costs. With `--fresh` every
process compiles anew while no other one works. `--kernels` adds the kernels of a step by name, those
that differ most from the baseline's.

n requests decode 128 tokens each, all blocks steered by K distinct vectors in turn. A cell that is named
again is measured again, in the same start.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from _gpu_engine import SHAPES, environment, prepare, runner_of, save_vectors, start
from _results import append

STEPS = 128
MARK = "@row "
CELLS = [(1, 0), (1, 1), (32, 0), (32, 32), (256, 0), (256, 1), (256, 256)]
CACHE_GIB = {"1.5B": 1.6, "8B": 6.6, "0.8B hybrid": 6.0}
"""What 256 requests of 192 tokens need, so that many processes fit on one device."""
WAYS = {
    "baseline": {"plugin": False},
    "plugin": {"plugin": True},
    "operators": {"plugin": True, "operators": "all"},
    "capture": {"plugin": True, "capture": True},
    "late": {"plugin": True},  # without the hint to make the edit early
}


def main() -> None:
    """Start the processes, let them take turns, print, and append to the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--starts", default=";".join(["1.5B"] * 5), help="see above")
    parser.add_argument("--ways", default="baseline,plugin", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--prefix-cache", action="store_true", help="with vLLM's prefix cache")
    parser.add_argument("--cells", type=cells, default=CELLS, help="n:K, joined by commas")
    parser.add_argument("--fresh", action="store_true", help="compile in each process, alone")
    parser.add_argument("--kernels", action="store_true", help="add the kernels of a step")
    parser.add_argument("--results", type=Path, help="folder to append to")
    parser.add_argument("--child", choices=list(WAYS))
    parser.add_argument("--shape", choices=list(SHAPES))
    parser.add_argument("--work", type=Path)
    given = parser.parse_args()
    if given.child:
        child(given)
        return
    ways, groups = given.ways.split(","), [g.split(",") for g in given.starts.split(";")]
    if wrong := set(ways) - set(WAYS):
        parser.error(f"--ways knows {', '.join(WAYS)}, not {', '.join(sorted(wrong))}")
    if wrong := {shape for group in groups for shape in group} - set(CACHE_GIB):
        parser.error(f"--starts knows {', '.join(CACHE_GIB)}, not {', '.join(sorted(wrong))}")
    # What was measured before an end that comes early is kept, and no process is left behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    rows: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder))
            for group in groups:
                turns(group, ways, given, Path(folder), rows)
    finally:
        publish(rows, given)


def cells(text: str) -> list[tuple[int, int]]:
    """Pairs of requests and vectors."""
    return [(int(n), int(k)) for n, k in (cell.split(":") for cell in text.split(","))]


def publish(rows: list[dict[str, Any]], given: argparse.Namespace) -> None:
    """Append each shape to the results, then print its table."""
    for shape in sorted({row["shape"] for row in rows}):
        these = [row for row in rows if row["shape"] == shape]
        kernels = differences(these)
        for row in these:
            row.pop("kernels", None)
        numbers = {"shape": shape, "prefix_cache": given.prefix_cache, "fresh": given.fresh}
        numbers |= {"rows": these, "summary": summary(these), "kernels": kernels}
        if given.results:
            append("steering", numbers, given.results)
        print(f"\n{shape}")
        show(numbers["summary"])
        for row in kernels:
            print(
                "{way:10} {n:4} {more_us:+8.1f} us  {times:g} times ({more_times:+g})  {kernel}".format(
                    **row
                )
            )


def turns(
    shapes: list[str],
    ways: list[str],
    given: argparse.Namespace,
    work: Path,
    rows: list[dict[str, Any]],
) -> None:
    """Start a group; in each cell every process has its turn, and what it finds joins `rows`."""
    began = time.monotonic()
    group = [(shape, way) for shape in shapes for way in ways]
    with ExitStack() as stack:
        children = []
        for shape, way in group:
            children.append(stack.enter_context(launch(shape, way, given, work)))
            stack.callback(children[-1].terminate)
            if given.fresh:
                answer(children[-1])
        for shape in set(shapes):
            norms = dict.fromkeys(range(SHAPES[shape]["num_hidden_layers"]), 1.0)
            save_vectors(work / shape, max(k for _, k in given.cells), SHAPES[shape], norms)
        for process in () if given.fresh else children:
            answer(process)
        print(f"{group} ready after {time.monotonic() - began:.0f} s", flush=True)
        for n, k in given.cells:
            for (shape, way), process in zip(group, children, strict=True):
                plain = way == "baseline"
                if plain and k and (n, 0) in given.cells:
                    continue
                process.stdin.write(f"{n} {0 if plain else k}\n")
                process.stdin.flush()
                rows.append({"shape": shape, "way": way, **answer(process)})
                shown = {name: v for name, v in rows[-1].items() if name != "kernels"}
                print(json.dumps(shown), flush=True)
    print(f"ended after {time.monotonic() - began:.0f} s", flush=True)


def launch(shape: str, way: str, given: argparse.Namespace, work: Path) -> Any:
    """A process that waits for cells on its standard input."""
    command = [sys.executable, __file__, "--child", way, "--work", str(work), "--shape", shape]
    command += ["--prefix-cache"] * given.prefix_cache + ["--kernels"] * given.kernels
    command += ["--cells", ",".join(f"{n}:{k}" for n, k in given.cells)]
    found = environment(work, **WAYS[way]) | {"WORKBENCH_LIBRARY": str(work / shape / "library")}
    found["TORCHINDUCTOR_COMPILE_THREADS"] = "4"
    if given.fresh:
        # Compiled code of Triton's is the same whoever compiled it: only choices are made anew.
        anew = tempfile.mkdtemp(dir=work)
        found |= {"VLLM_CACHE_ROOT": anew, "TORCHINDUCTOR_CACHE_DIR": f"{anew}/inductor"}
        found |= {"TRITON_CACHE_DIR": str(Path.home() / ".triton" / "cache")}
        found["TORCHINDUCTOR_COMPILE_THREADS"] = str(os.cpu_count())
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=found, **pipes)


def answer(process: Any) -> dict[str, Any]:
    """The next row that a process prints."""
    for line in process.stdout:
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
        print(line, end="", flush=True)
    sys.exit(f"a process ended with {process.wait()}")


# -- a process that measures ----------------------------------------------------------------------


def child(given: Any) -> None:
    """Start vLLM, then measure the cells that come in."""
    if given.child == "late":
        from workbench.engines.vllm import edit

        edit.early = lambda x: x
        os.environ["VLLM_DISABLE_COMPILE_CACHE"] = "1"
    shape = SHAPES[given.shape]
    sizes = sorted({n for n, _ in given.cells})
    llm = start(
        given.work / given.shape,
        load_format="dummy",
        max_num_seqs=max(sizes),
        enable_prefix_caching=given.prefix_cache,
        disable_log_stats=True,
        gpu_memory_utilization=0.05,  # replaced by what follows
        kv_cache_memory_bytes=int(CACHE_GIB[given.shape] * 2**30),
        max_num_batched_tokens=8192,
        compilation_config={"cudagraph_capture_sizes": sizes},
    )
    runner = runner_of(llm)
    graph, host = Timer(), Timer()
    manager, state = runner.cudagraph_manager, runner.model_state
    manager.run_fullgraph = graph.around(manager.run_fullgraph, device=True)
    state.prepare_inputs = host.around(state.prepare_inputs)
    print(MARK + "{}", flush=True)
    draw = random.Random(0)
    for line in sys.stdin:
        n, k = map(int, line.split())
        row = measure(llm, n, k, shape["num_hidden_layers"], draw, graph, host)
        if given.kernels:
            row["kernels"] = kernels(graph.last)
        print(MARK + json.dumps(row), flush=True)


def measure(
    llm: Any, n: int, k: int, blocks: int, draw: random.Random, graph: Timer, host: Timer
) -> dict[str, Any]:
    """One cell: n requests, of which each has one of k vectors."""
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": [draw.randrange(2, 30000) for _ in range(64)]} for _ in range(n)
    ]
    steers = [{"steer": f"v{i % k}=0.01:0-{blocks - 1}"} if k else None for i in range(n)]
    settings: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
    rates = []
    for turn in range(4):
        graph.on, host.on = turn == 3, turn == 2
        length = 8 if turn == 0 else STEPS
        params = [SamplingParams(max_tokens=length, extra_args=s, **settings) for s in steers]
        started = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        if turn in (1, 2):
            rates.append(n * length / (time.perf_counter() - started))
    graph_us, host_us = graph.take(), host.take()
    return {
        "n": n,
        "k": k,
        "graph_us": round(statistics.median(graph_us), 2),
        "host_us": round(statistics.median(host_us), 2),
        "host_mean_us": round(statistics.mean(host_us), 2),
        "host_worst_us": round(max(host_us)),
        "tokens_per_s": [round(r) for r in rates],
    }


def kernels(step: Any) -> dict[str, list[float]]:
    """How often each kernel runs in a step, and its microseconds together."""
    import torch

    again = 10
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(again):
            step()
        torch.cuda.synchronize()
    return {
        event.key: [event.count / again, round(event.self_device_time_total / again, 2)]
        for event in profile.key_averages()
        if event.self_device_time_total
    }


class Timer:
    """Times of calls in microseconds: on the device between two events that follow a sleep, or the host's."""

    def __init__(self) -> None:
        self.on = False
        self.events: list[tuple[Any, Any]] = []
        self.hosts: list[float] = []
        self.last: Any = None

    def around(self, call: Any, device: bool = False) -> Any:
        """The call, timed while `on`."""
        import torch

        def timed(*args: Any, **kw: Any) -> Any:
            if not self.on:
                return call(*args, **kw)
            if not device:
                started = time.perf_counter()
                out = call(*args, **kw)
                self.hosts.append((time.perf_counter() - started) * 1e6)
                return out
            self.last = partial(call, *args, **kw)
            # While the device sleeps the host runs ahead: launches are then not part of the time.
            torch.cuda._sleep(1_500_000)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            out = call(*args, **kw)
            end.record()
            self.events.append((begin, end))
            return out

        return timed

    def take(self) -> list[float]:
        """The times, once."""
        import torch

        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) * 1e3 for begin, end in self.events] + self.hosts
        self.events, self.hosts = [], []
        return times or [float("nan")]


# -- both -----------------------------------------------------------------------------------------


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each cell: medians over its turns in all starts, their spread, and the ratio to the baseline."""
    found = []
    for way, n, k in sorted({(r["way"], r["n"], r["k"]) for r in rows}):
        these = [r for r in rows if (r["way"], r["n"], r["k"]) == (way, n, k)]
        base = [r["graph_us"] for r in rows if r["way"] == "baseline" and r["n"] == n]
        graphs = [r["graph_us"] for r in these]
        rates = sorted(statistics.median(r["tokens_per_s"]) for r in these)
        row: dict[str, Any] = {"way": way, "n": n, "k": k, "turns": len(these)}
        row |= {"graph_us": statistics.median(graphs), "range_us": [min(graphs), max(graphs)]}
        row["over"] = row["graph_us"] / statistics.median(base) - 1 if base else None
        row["host_us"] = round(statistics.median(r["host_us"] for r in these), 1)
        row["tokens_per_s"] = [rates[0], statistics.median(rates), rates[-1]]
        found.append(row)
    return found


def differences(rows: list[dict[str, Any]], most: int = 10) -> list[dict[str, Any]]:
    """The kernels whose time in a step differs most from the baseline's, medians over the starts."""
    found = []
    for way, n in sorted({(r["way"], r["n"]) for r in rows if r["way"] != "baseline"}):
        both = [
            [r["kernels"] for r in rows if (r["way"], r["n"]) == (one, n) and "kernels" in r]
            for one in ("baseline", way)
        ]
        if not all(both):
            continue
        names = {name for starts in both for kernels in starts for name in kernels}
        base, ours = (
            {
                name: [statistics.median(k.get(name, [0, 0])[i] for k in starts) for i in (0, 1)]
                for name in names
            }
            for starts in both
        )
        for name in sorted(names, key=lambda name: -abs(ours[name][1] - base[name][1]))[:most]:
            times, more = ours[name][0] - base[name][0], round(ours[name][1] - base[name][1], 2)
            row = {"way": way, "n": n, "kernel": name, "more_us": more}
            found.append(row | {"times": ours[name][0], "more_times": times})
    return found


def show(cells: list[dict[str, Any]]) -> None:
    """Print the cells as a table."""
    print(f"{'way':10} {'n':>4} {'K':>4} {'graph us':>22} {'over':>7} {'host us':>8}  tokens/s")
    for row in cells:
        over = "" if row["over"] is None else f"{row['over']:+.2%}"
        low, high = row["range_us"]
        spread = f"{row['graph_us']:.1f} ({low:.1f}-{high:.1f})"
        speed = " / ".join(f"{r:.0f}" for r in row["tokens_per_s"])
        where = f"{row['way']:10} {row['n']:4} {row['k']:4}"
        print(f"{where} {spread:>22} {over:>7} {row['host_us']:8} {speed}")


if __name__ == "__main__":
    main()
