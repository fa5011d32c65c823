"""Random steered requests in real vLLM, cancelled and preempted: what leaks, and who gets what of others.

`--requests` requests over 64 vectors go to a tiny random Llama in vLLM's own engine, few at a time and
with too few rows and blocks for them: doses, blocks, phases, operators, start positions, shared prefixes
and priorities are drawn by `--seed`. Every `ROUND` requests the engine runs empty, and then nothing may be
left of any. A sample is scored by transformers, alone and with teacher forcing, with its own steering and
with another vector's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from _results import append, publish

from vectors.steering.controls import random_direction
from vectors.steering.operators import apply_edit, combine, edit_of
from vectors.store import Library
from vectors.types import Phase, SteeringVector
from workbench.engines.vllm.spec import resolve_request
from workbench.models.blocks import decoder_blocks

BASE = "0" * 64
VECTORS, BLOCKS, WIDTH, WORDS = 64, 4, 64, 512
ROUND, OPEN, ROWS = 500, 64, 20
SAMPLED = 0.05
ALLOWED_NATS = 1e-4
GAP = 100.0
GROWTH_MB = 128.0  # from the first fifth, when caches fill, to the last
LATE_GROWTH_MB = 8.0  # from the third fifth to the last, when all caches are full
OPTIONS = {
    "dtype": "float32",
    "max_model_len": 160,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 16,
    "block_size": 32,
    "num_gpu_blocks_override": 36,
    "scheduling_policy": "priority",
}


@dataclass
class Asked:
    """One request and what came of it."""

    name: str
    ids: list[int]
    terms: list[tuple[str, float, int, int, str, str]]
    start: int
    tokens: int
    priority: int
    sampled: bool
    found: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)

    @property
    def steer(self) -> str:
        """Its terms in the grammar, or as JSON where that alone can say them."""
        if not self.start:
            return ",".join(f"{n}={d}:{a}-{b}/{p}!{o}" for n, d, a, b, p, o in self.terms)
        keys = ("name", "dose", "blocks", "phase", "operator")
        said = [(n, d, list(range(a, b + 1)), p, o) for n, d, a, b, p, o in self.terms]
        terms = [dict(zip(keys, term, strict=True)) for term in said]
        return json.dumps({"terms": terms, "start": self.start})

    def positions(self, end: int) -> int:
        """How many positions below `end` are steered."""
        length, total = len(self.ids), 0
        phases = {p for *_, p, _ in self.terms}
        if phases & {"prompt", "all"}:
            total += max(0, min(end, length) - self.start)
        if phases & {"decode", "all"}:
            total += max(0, end - max(length, self.start))
        return total


class Asker:
    """Draws requests; the same seed asks the same."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.prefixes = [self.words(size) for size in (32, 32, 64, 64)]
        self.usual = [self.terms() for _ in range(16)]

    def words(self, count: int) -> list[int]:
        """Random token ids."""
        return [self.rng.randrange(4, WORDS) for _ in range(count)]

    def terms(self) -> list[tuple[str, float, int, int, str, str]]:
        """One to three vectors; operators beside `add` stand alone."""
        rng, found = self.rng, []
        count = rng.choice((1, 1, 1, 2, 3))
        for name in rng.sample(range(VECTORS), count):
            first = rng.randrange(BLOCKS)
            last = rng.randrange(first, BLOCKS)
            dose = round(rng.choice((-1, 1)) * rng.uniform(0.5, 2.0), 2)
            phase = rng.choice(("all", "all", "prompt", "decode"))
            operator = "add"
            if count == 1 and rng.random() < 0.25:
                operator = rng.choice(("ablate", "clamp", "turn"))
                dose = abs(dose) if operator == "turn" else min(1.0, abs(dose))
            found.append((f"v{name}", dose, first, last, phase, operator))
        return found

    def ask(self, number: int) -> Asked:
        """The next request."""
        rng = self.rng
        ids = rng.choice([[], *self.prefixes]) + self.words(rng.randrange(6, 40))
        steered = rng.random() < 0.75
        terms = (rng.choice(self.usual) if rng.random() < 0.4 else self.terms()) if steered else []
        start = rng.randrange(1, len(ids) + 6) if terms and rng.random() < 0.15 else 0
        tokens = rng.randrange(1, 25)
        name, priority, sampled = f"r{number}", rng.randrange(3), rng.random() < SAMPLED
        return Asked(name, ids, terms, start, tokens, priority, sampled)


class Storm:
    """Sends requests to an engine in this process, and looks into it when it is empty."""

    def __init__(self, folder: Path) -> None:
        from vllm import EngineArgs, LLMEngine
        from vllm.v1.core.sched.scheduler import Scheduler

        self.counts: Counter[str] = Counter()
        preempt = Scheduler._preempt_request

        def counted(*args: Any, **kw: Any) -> Any:
            self.counts["preempted"] += 1
            return preempt(*args, **kw)

        Scheduler._preempt_request = counted
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                str(folder),
                enforce_eager=True,
                skip_tokenizer_init=True,
                disable_log_stats=True,
                worker_extension_cls="workbench.engines.vllm.worker.WorkbenchWorker",
                **OPTIONS,
            )
        )
        core: Any = self.engine.engine_core
        self.scheduler = core.engine_core.scheduler
        worker = core.engine_core.model_executor.driver_worker
        self.steering = worker.model_runner.workbench_steering
        self.open: dict[str, Asked] = {}
        self.kept: list[Asked] = []

    def run(self, asker: Asker, first: int, count: int) -> None:
        """Ask `count` requests, a few at a time, and wait for all."""
        rng, number = asker.rng, first
        while number < first + count or self.open:
            for _ in range(rng.randrange(8)):
                if number < first + count and len(self.open) < OPEN:
                    self.add(asker.ask(number))
                    number += 1
            if self.open and rng.random() < 0.5:
                self.cancel(self.open[rng.choice(list(self.open))])
            self.step()
        self.step()  # the workers hear of the last ends
        self.empty()

    def add(self, asked: Asked) -> None:
        """Send it."""
        from vllm import SamplingParams

        steer = {"steer": asked.steer, "steer_id": asked.name} if asked.terms else None
        params = SamplingParams(
            max_tokens=asked.tokens,
            logprobs=0 if asked.sampled else None,
            ignore_eos=True,
            detokenize=False,
            extra_args=steer,
        )
        prompt: Any = {"prompt_token_ids": asked.ids}
        self.open[asked.name] = asked
        self.engine.add_request(asked.name, prompt, params, priority=asked.priority)
        self.counts["requests"] += 1
        self.counts["steered"] += bool(asked.terms)

    def cancel(self, asked: Asked) -> None:
        """Leave, as a client does whose connection breaks."""
        self.engine.abort_request([asked.name])
        self.counts["cancelled"] += 1
        self.end(asked, whole=False)

    def step(self) -> None:
        """One step of the engine."""
        for out in self.engine.step():
            asked = self.open.get(out.request_id)
            if asked is None:
                continue
            first = out.outputs[0]
            asked.found = list(first.token_ids)
            if asked.sampled:
                rows = zip(first.logprobs, asked.found, strict=True)
                asked.logps = [row[token].logprob for row, token in rows]
            if out.finished:
                self.demand(first.finish_reason == "length", f"{asked.name}: {first.stop_reason}")
                self.end(asked, whole=True)
        admission = getattr(self.scheduler, "workbench_admission", None)
        held = len(admission.held) if admission is not None else 0
        self.counts["waiting_for_rows"] = max(self.counts["waiting_for_rows"], held)

    def end(self, asked: Asked, whole: bool) -> None:
        """Take the receipt of a request that has ended, and compare it with what was asked."""
        del self.open[asked.name]
        if asked.terms:
            proof = self.steering.receipt(asked.name)
            seen = proof["prompt"] + proof["decode"] + proof["cached"]
            wanted = asked.positions(len(asked.ids) + len(asked.found) - 1)
            right = seen == wanted if whole else seen >= wanted or not asked.found
            self.demand(right, f"{asked.name}: {seen} positions steered, {wanted} wanted")
            self.counts["positions"] += seen
        if asked.sampled and len(asked.found) > 4:
            self.kept.append(asked)

    def empty(self) -> None:
        """Nothing of any request is left."""
        steering, admission = self.steering, self.scheduler.workbench_admission
        pool = self.scheduler.kv_cache_manager.block_pool
        left = {
            "rows in use": steering.bank.used,
            "blocks at work": len(steering.table.live),
            "slots": len(steering._slots_S4) - len(set(steering._free)),
            "slots that say something": int(steering._slots_S4.any()),
            "live proofs": len(steering._live) + len(steering._slot_of),
            "receipts": len(steering._receipts),
            "refusals": len(steering.refused),
            "counted rows": len(admission._users) + sum(admission._used.values()),
            "counted requests": len(admission._rows) + len(admission.held),
            "vLLM's requests": len(self.scheduler.requests),
            "blocks of the cache": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
        }
        self.demand(not any(left.values()), f"left: { {k: n for k, n in left.items() if n} }")

    def demand(self, right: bool, words: str) -> None:
        """Count and show what is wrong."""
        if not right:
            self.counts["wrong"] += 1
            print(words, file=sys.stderr)


class Reference:
    """Scores a request alone in transformers, its layers steered by hooks."""

    def __init__(self, folder: Path, library: Library) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.library = library

    def logps(self, asked: Asked) -> list[float]:
        """The log-probability of each token that was found."""
        length, ids = len(asked.ids), asked.ids + asked.found
        edits: dict[tuple[int, Phase], list[Any]] = {}
        if asked.terms:
            resolved = resolve_request(asked.steer, self.library, BASE)
            for phase in (Phase.PROMPT, Phase.DECODE):
                for i in resolved.at(phase):
                    vector = self.library.vector_by_digest(i.vector)
                    made = edit_of(
                        i.operator, vector.directions[i.block], vector.mean_norms[i.block], i.dose
                    )
                    edits.setdefault((i.block, phase), []).append(made)
        spans = {
            Phase.PROMPT: slice(min(asked.start, length), length),
            Phase.DECODE: slice(max(asked.start, length), None),
        }

        def edited(span: slice, edit: Any) -> Any:
            def hook(module: Any, inputs: Any, output: Any) -> Any:
                whole = output[0] if isinstance(output, tuple) else output
                h_1TD = whole.clone()
                h_1TD[0, span] = apply_edit(h_1TD[0, span], edit)
                return (h_1TD, *output[1:]) if isinstance(output, tuple) else h_1TD

            return hook

        layers = decoder_blocks(self.model)
        with ExitStack() as stack, torch.no_grad():
            for (block, phase), made in edits.items():
                hook = edited(spans[phase], combine(made))
                stack.callback(layers[block].register_forward_hook(hook).remove)
            logits_TV = self.model(torch.tensor([ids])).logits[0]
        logp_TV = logits_TV.log_softmax(-1)[length - 1 : -1]
        return logp_TV[range(len(asked.found)), asked.found].tolist()


def compare(kept: list[Asked], reference: Reference) -> dict[str, float]:
    """The largest error of the sample, and the smallest that another vector in its place makes."""
    errors, wrong = [], []
    for asked in kept:
        errors.append(_apart(asked.logps, reference.logps(asked)))
        # A removed direction of which the stream has little changes little, whichever it is.
        if any(operator == "ablate" for *_, operator in asked.terms):
            continue
        if asked.positions(len(asked.ids) + len(asked.found) - 1) > 2:
            other = [(f"v{(int(n[1:]) + 1) % VECTORS}", *rest) for n, *rest in asked.terms]
            wrong.append(_apart(asked.logps, reference.logps(replace(asked, terms=other))))
    return {
        "sampled": len(errors),
        "largest_error_nats": max(errors),
        "wrong_vectors": len(wrong),
        "wrong_smallest_nats": min(wrong),
        "wrong_median_nats": statistics.median(wrong),
        "gap": min(wrong) / max(errors),
    }


def _apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def make(root: Path) -> tuple[Path, Library]:
    """A tiny random Llama, and the vectors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.15,
    )
    LlamaForCausalLM(config).save_pretrained(root / "model")
    library = Library(root / "library")
    for n in range(VECTORS):
        directions = {b: random_direction(WIDTH, BLOCKS * n + b) for b in range(BLOCKS)}
        norms = dict.fromkeys(directions, 8.0)
        library.save_vector(f"v{n}", SteeringVector(BASE, directions, norms, 2))
    return root / "model", library


def storm(root: Path, requests: int, seed: int) -> dict[str, Any]:
    """Run it all; progress goes to the standard error."""
    folder, library = make(root)
    os.environ |= {
        "WORKBENCH_BASE": BASE,
        "WORKBENCH_LIBRARY": str(library.root),
        "WORKBENCH_ROWS": str(ROWS),
        "VLLM_PLUGINS": "workbench_steering",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(root / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm.model_executor.models import registry

    # vLLM asks another process what a model's class can do, to keep CUDA out of this one.
    registry._run_in_subprocess = lambda ask: ask()
    sent, asker, process = Storm(folder), Asker(seed), psutil.Process()
    memory, began = [], time.monotonic()
    for first in range(0, requests, ROUND):
        sent.run(asker, first, min(ROUND, requests - first))
        memory.append(process.memory_info().rss / 2**20)
        seconds, done = time.monotonic() - began, sent.counts["requests"]
        print(f"{done} of {requests}, {seconds:.0f} s, {memory[-1]:.0f} MB", file=sys.stderr)
    seconds = time.monotonic() - began
    found = compare(sent.kept, Reference(folder, library))
    return {
        "seed": seed,
        **dict(sent.counts),
        "rows": ROWS,
        "slots": [OPTIONS["max_num_seqs"], len(sent.steering._slots_S4)],
        "rows_loaded": sent.steering.bank.loaded,
        "wrong": sent.counts["wrong"],
        "seconds": round(seconds, 1),
        "memory_mb": round(memory[-1]),
        "growth_mb": grown(memory, 0),
        "late_growth_mb": grown(memory, 2),
        **found,
    }


def grown(memory: list[float], first: int) -> float | None:
    """How much more the last fifth used than fifth `first`; None where rounds are too few to say."""
    size = len(memory) // 5
    if size < 2:
        return None
    before = memory[first * size : (first + 1) * size]
    return round(statistics.fmean(memory[-size:]) - statistics.fmean(before), 2)


def failures(numbers: dict[str, Any]) -> list[str]:
    """What must not be, in words."""
    checks = {
        f"{numbers['wrong']} checks failed": numbers["wrong"] > 0,
        f"an error above {ALLOWED_NATS} nats": numbers["largest_error_nats"] > ALLOWED_NATS,
        f"a wrong vector within {GAP} times that": numbers["wrong_smallest_nats"]
        < GAP * ALLOWED_NATS,
        f"memory grew by more than {GROWTH_MB} MB": (numbers["growth_mb"] or 0) > GROWTH_MB,
        f"memory still grew by more than {LATE_GROWTH_MB} MB": (numbers["late_growth_mb"] or 0)
        > LATE_GROWTH_MB,
    }
    return [words for words, found in checks.items() if found]


def main() -> int:
    """Run and print; exit code 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--keep", action="store_true", help="append to benchmarks/results")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        numbers = storm(Path(name), given.requests, given.seed)
    publish("faults", numbers, as_json=given.json, results=None)
    if given.keep:
        append("faults", numbers)
    wrong = failures(numbers)
    print("; ".join(wrong) or "all checks passed", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
