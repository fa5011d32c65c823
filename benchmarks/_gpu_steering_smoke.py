"""Steering in real vLLM on a CUDA device: right first, then its cost per decode step.

    python benchmarks/_gpu_steering_smoke.py [--runner v2|v1] [--children check,baseline,plugin]

1. A small random model (8 blocks) in vLLM, compiled, with full CUDA graphs: a mixed batch of plain and
   steered requests, phases and operators; every token's log-probability is compared with plain
   transformers with hooks, and with what a wrong vector would give.
2. The 1.5B shape with random weights, baseline and plugin in turn, a process each: GPU time of the
   decode graph (CUDA events behind a short sleep, so that no launch is in it), GPU and host time of the
   plugin's own step, tokens per second.

Appends a JSON line for each measurement. Exits with 1 if anything of step 1 is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BASE = "0" * 64
SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "heads": 8,
    "vocab_size": 2048,
}
BIG = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "heads": 12,
    "vocab_size": 151936,
}
STEPS = 128
CHILDREN = ("check", "baseline", "plugin", "plugin-add")
CASES = [
    "",
    "v0=1.0:3",
    "v1=0.5:0-7,v2=-0.7:4",
    "v3=1.0:2/prompt",
    "v4=1.0:5/decode",
    "",
    "v5=1.0:3!ablate",
    "v6=0.8:4!clamp",
    "v7=1.0:2!turn",
    '{"terms": [{"name": "v0", "dose": 1.0, "blocks": [3]}], "start": 20}',
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runner", choices=["v2", "v1"], default="v2")
    parser.add_argument("--out", type=Path, default=Path("steering-smoke.jsonl"))
    parser.add_argument(
        "--children",
        default=",".join(["check", *["baseline", "plugin", "plugin-add"] * 2]),
        help="which to run, in this order: check, baseline, plugin (all operators), plugin-add",
    )
    parser.add_argument("--child", choices=CHILDREN)
    parser.add_argument("--work", type=Path)
    given = parser.parse_args()
    if wrong := set(given.children.split(",")) - set(CHILDREN):
        parser.error(f"--children knows {', '.join(CHILDREN)}, not {', '.join(sorted(wrong))}")
    if given.child == "check":
        check(given.work)
    elif given.child:
        measure(given.child, given.work, given.out)
    else:
        parent(given)


def parent(given: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work)
        for child in given.children.split(","):
            environment = child_environment(child, work, given.runner)
            command = [sys.executable, __file__, "--child", child, "--work", folder]
            command += ["--out", str(given.out.resolve()), "--runner", given.runner]
            started = time.monotonic()
            done = subprocess.run(command, env=environment, check=False)
            print(
                f"{child}: {time.monotonic() - started:.0f} s, exit {done.returncode}", flush=True
            )
            if done.returncode:
                sys.exit(1)
        if given.out.exists():
            table(given.out)


def prepare(work: Path) -> None:
    """What the children share: an entry point for vLLM to find, two models, a library."""
    info = work / "site" / "steering_workbench.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: steering-workbench\nVersion: 0.1.0\n"
    )
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nworkbench_steering = workbench.engines.vllm.plugin:register\n"
    )
    for name, shape in (("small", SMALL), ("big", BIG)):
        (work / name).mkdir()
        (work / name / "config.json").write_text(json.dumps(config_of(shape)))


def config_of(shape: dict[str, int]) -> dict[str, Any]:
    rest = {k: v for k, v in shape.items() if k != "heads"}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": 2,
        "head_dim": 128 if shape is BIG else 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "initializer_range": 0.06,
        **rest,
    }


def child_environment(child: str, work: Path, runner: str) -> dict[str, str]:
    paths = [ROOT, ROOT / "kernels", work / "site", ROOT / ".gpu" / "extra"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "v2" else "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "workbench_steering",
        "WORKBENCH_LIBRARY": str(work / "library"),
    }
    environment.pop("WORKBENCH_BASE", None)
    if child != "baseline":
        environment["WORKBENCH_BASE"] = BASE
        environment["WORKBENCH_OPERATORS"] = "add" if child == "plugin-add" else "all"
    return environment


def start(model: Path, child: str, **more: Any) -> Any:
    from vllm import LLM

    extension = {}
    if child != "baseline":
        extension["worker_extension_cls"] = "workbench.engines.vllm.worker.WorkbenchWorker"
    settings = {
        "skip_tokenizer_init": True,
        "max_model_len": 2048,
        "gpu_memory_utilization": 0.6,
        "seed": 0,
    }
    return LLM(str(model), dtype="bfloat16", **{**settings, **extension, **more})


def runner_of(llm: Any) -> Any:
    return llm.collective_rpc(lambda worker: worker.model_runner)[0]


# -- 1: right -------------------------------------------------------------------------------------


def check(work: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from vllm import SamplingParams

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(work / "small")
    made = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    made.save_pretrained(work / "small")
    save_vectors(work, 8, SMALL["num_hidden_layers"], SMALL["hidden_size"], stream_norms(made))
    llm = start(work / "small", "plugin", max_logprobs=5)
    hello = llm.collective_rpc("workbench_hello")[0]
    print(json.dumps(hello, indent=1))
    draw = random.Random(0)
    prompts = [[draw.randrange(2, 2048) for _ in range(17 + 3 * n)] for n in range(len(CASES))]

    def ask(which: list[int]) -> list[Any]:
        params = [
            SamplingParams(
                temperature=0.0,
                max_tokens=24,
                ignore_eos=True,
                logprobs=1,
                detokenize=False,
                extra_args={"steer": CASES[n], "steer_id": f"id{n}"} if CASES[n] else None,
            )
            for n in which
        ]
        return llm.generate([{"prompt_token_ids": prompts[n]} for n in which], params)

    together = ask(list(range(len(CASES))))
    receipts = [
        llm.collective_rpc("workbench_receipt", args=(f"id{n}",))[0] for n in range(len(CASES))
    ]
    alone = [ask([n])[0] for n in range(len(CASES))]
    reference = Reference(made.to("cuda"), work)
    errors, wrong = [], []
    for n, (text, one) in enumerate(zip(CASES, together, strict=True)):
        ids = list(one.outputs[0].token_ids)
        ours = [row[t].logprob for row, t in zip(one.outputs[0].logprobs, ids, strict=True)]
        for found, how in ((errors, text), (wrong, "")):
            theirs = reference.logprobs(prompts[n], ids, how)
            found.append([abs(a - b) for a, b in zip(ours, theirs, strict=True)])
    # What rounding alone does, on this device and in this dtype, the unsteered cases show.
    rounding = max(statistics.median(e) for e, text in zip(errors, CASES, strict=True) if not text)
    bad = 0
    print(f"{'case':64} {'worst':>7} {'median':>7} {'unsteered':>9} {'alone':>6}  receipt")
    for n, text in enumerate(CASES):
        worst, median = max(errors[n]), statistics.median(errors[n])
        unsteered = statistics.median(wrong[n])
        same = together[n].outputs[0].token_ids == alone[n].outputs[0].token_ids
        right = median <= 1.5 * rounding and worst < 0.5
        if text:
            right &= unsteered > 5 * median and receipts[n]["least"] > 0
        bad += not right
        flag = "" if right else "   WRONG"
        print(
            f"{text[:64]:64} {worst:7.3f} {median:7.4f} {unsteered:9.3f} "
            f"{same!s:>6}  {receipts[n]}{flag}"
        )
    if bad:
        sys.exit(f"{bad} of {len(CASES)} cases are wrong")
    print("all cases agree with transformers")


def stream_norms(model: Any) -> list[float]:
    import torch

    ids = torch.randint(2, 2000, (2, 64), generator=torch.Generator().manual_seed(1))
    norms: list[float] = []

    def read(module: Any, inputs: Any, output: Any) -> None:
        h = output if isinstance(output, torch.Tensor) else output[0]
        norms.append(float(h.float().norm(dim=-1).mean()))

    hooks = [layer.register_forward_hook(read) for layer in model.model.layers]
    with torch.inference_mode():
        model(ids)
    for hook in hooks:
        hook.remove()
    return norms


def save_vectors(work: Path, count: int, blocks: int, width: int, norms: list[float]) -> None:
    from vectors.steering.controls import random_direction
    from vectors.store import Library
    from vectors.types import SteeringVector

    library = Library(work / "library")
    for n in range(count):
        directions = {b: random_direction(width, 1000 * n + b) for b in range(blocks)}
        vector = SteeringVector(BASE, directions, dict(enumerate(norms)), blocks // 2)
        library.save_vector(f"v{n}", vector)


class Reference:
    """Plain transformers with hooks that apply the reference of the operators."""

    def __init__(self, model: Any, work: Path) -> None:
        from vectors.store import Library

        self.model = model
        self.library = Library(work / "library")

    def logprobs(self, prompt: list[int], ids: list[int], text: str) -> list[float]:
        import torch

        from vectors.steering.operators import apply_edit, combine, edit_of
        from vectors.types import Phase
        from workbench.engines.vllm.spec import resolve_request

        resolved = resolve_request(text, self.library, BASE) if text else None
        whole = [*prompt, *ids]
        hooks = []

        def hook(block: int) -> Any:
            def edit(module: Any, inputs: Any, output: Any) -> Any:
                h = output if isinstance(output, torch.Tensor) else output[0]
                h = h.clone()
                spans = {Phase.PROMPT: (0, len(prompt)), Phase.DECODE: (len(prompt), len(whole))}
                for phase, (first, last) in spans.items():
                    edits = [
                        edit_of(i.operator, v.directions[block], v.mean_norms[block], i.dose)
                        for i in resolved.at(phase)
                        if i.block == block
                        for v in [self.library.vector_by_digest(i.vector)]
                    ]
                    first = max(first, resolved.start)
                    if edits and first < last:
                        part = h[0, first:last].float()
                        h[0, first:last] = apply_edit(part, combine(edits)).to(h.dtype)
                return h if isinstance(output, torch.Tensor) else (h, *output[1:])

            return edit

        if resolved is not None:
            layers = self.model.model.layers
            hooks = [
                layers[b].register_forward_hook(hook(b))
                for b in {i.block for i in resolved.injections}
            ]
        with torch.inference_mode():
            logits = self.model(torch.tensor([whole], device="cuda")).logits[0].float()
        for handle in hooks:
            handle.remove()
        logp = logits.log_softmax(-1)
        return [float(logp[len(prompt) - 1 + i, t]) for i, t in enumerate(ids)]


# -- 2: its cost ----------------------------------------------------------------------------------


def measure(child: str, work: Path, out: Path) -> None:
    import torch
    import vllm
    from vllm import SamplingParams

    names = 256
    if not (work / "big" / "saved").exists():
        save_vectors(work, names, BIG["num_hidden_layers"], BIG["hidden_size"], [1.0] * 28)
        (work / "big" / "saved").touch()
    llm = start(
        work / "big",
        child,
        load_format="dummy",
        max_num_seqs=256,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    runner = runner_of(llm)
    graph, steps = Timer(), Timer()
    if hasattr(runner, "cudagraph_manager"):
        manager = runner.cudagraph_manager
        manager.run_fullgraph = graph.around(manager.run_fullgraph)
    if child != "baseline":
        steering = getattr(runner, "model_state", runner).workbench_steering
        steering.expand = steps.around(steering.expand)
    draw = random.Random(0)
    for n in (1, 32, 256):
        for k in (0,) if child == "baseline" else (0, 1, n):
            prompts = [
                {"prompt_token_ids": [draw.randrange(2, 30000) for _ in range(64)]}
                for _ in range(n)
            ]
            params = [
                SamplingParams(
                    temperature=0.0,
                    max_tokens=STEPS,
                    ignore_eos=True,
                    detokenize=False,
                    extra_args={"steer": f"v{i % k}=0.01:0-27"} if k else None,
                )
                for i in range(n)
            ]
            llm.generate(prompts, params, use_tqdm=False)
            rates = []
            for timed in (False, False, False, True):
                graph.on = steps.on = timed
                started = time.perf_counter()
                llm.generate(prompts, params, use_tqdm=False)
                if not timed:
                    rates.append(n * STEPS / (time.perf_counter() - started))
            row = {
                "child": child,
                "n": n,
                "k": k,
                "graph_us": graph.gpu(),
                "step_gpu_us": steps.gpu(),
                "step_host_us": steps.host(),
                "tokens_per_s": [round(r) for r in rates],
                "device": torch.cuda.get_device_name(),
                "vllm": vllm.__version__,
                "torch": torch.__version__,
                "runner": type(runner).__module__,
            }
            print(json.dumps(row), flush=True)
            with open(out, "a") as file:
                file.write(json.dumps(row) + "\n")


class Timer:
    """GPU time between two events that follow a sleep, and host time, of a call."""

    def __init__(self) -> None:
        self.on = False
        self.events: list[tuple[Any, Any]] = []
        self.hosts: list[float] = []

    def around(self, call: Any) -> Any:
        import torch

        def timed(*args: Any, **kw: Any) -> Any:
            if not self.on:
                return call(*args, **kw)
            # While the device sleeps the host runs ahead: launches are then not part of the time.
            torch.cuda._sleep(1_500_000)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            started = time.perf_counter()
            out = call(*args, **kw)
            self.hosts.append(time.perf_counter() - started)
            end.record()
            self.events.append((begin, end))
            return out

        return timed

    def gpu(self) -> float | None:
        import torch

        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) * 1e3 for begin, end in self.events]
        self.events = []
        return round(statistics.median(times), 2) if times else None

    def host(self) -> float | None:
        times, self.hosts = self.hosts, []
        return round(statistics.median(times) * 1e6, 2) if times else None


def table(out: Path) -> None:
    """Print what the file holds: GPU time over the median baseline, the plugin's own step included."""
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    head = f"{'':11} {'n':>4} {'k':>4} {'graph us, each start':>28} {'over':>7}"
    print(f"\n{head} {'step gpu':>9} {'host':>6} tokens/s")
    for child, n, k in sorted({(r["child"], r["n"], r["k"]) for r in rows}):
        these = [r for r in rows if (r["child"], r["n"], r["k"]) == (child, n, k)]
        baseline = [r["graph_us"] for r in rows if r["child"] == "baseline" and r["n"] == n]
        graphs = [r["graph_us"] for r in these]
        over = ""
        if all(graphs) and all(baseline) and baseline:
            mine = statistics.median(graphs) + (these[0]["step_gpu_us"] or 0)
            over = f"{mine / statistics.median(baseline) - 1:+.2%}"
        step, host = these[0]["step_gpu_us"], these[0]["step_host_us"]
        rates = [round(statistics.median(r["tokens_per_s"])) for r in these]
        row = f"{child:11} {n:4} {k:4} {graphs!s:>28} {over:>7} {step!s:>9} {host!s:>6}"
        print(f"{row} {rates}")


if __name__ == "__main__":
    main()
