"""Steering, conditions and capture in real vLLM on a CUDA device, compared with plain transformers.

    python benchmarks/_gpu_steering_check.py [--shape small|small-hybrid]

A small random model, compiled, with full CUDA graphs: a mixed batch of plain and steered requests, phases,
operators and conditions. The log-probability of every token is compared with transformers' in float32 with
hooks, and may be off by little more than transformers' own in bfloat16; what would come of a wrong outcome,
such as no vector, must be far away. Then captured means and projections of tokens are compared with hooks'.
Exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _gpu_engine import BASE, SHAPES, environment, prepare, save_vectors, start


@dataclass(frozen=True)
class Case:
    """What a request asks, what should come of it, and what would come of a wrong outcome."""

    text: str
    right: str
    wrong: str


def case(text: str, wrong: str = "") -> Case:
    """A request whose text is done as it stands."""
    return Case(text, text, wrong)


def cases(projection: float) -> list[Case]:
    """All of them; prompts of the conditional ones have at least this projection on v5."""
    term = {"name": "v1", "dose": 1.0, "blocks": [3], "phase": "decode"}
    condition = {"name": "v5", "block": 3}
    above, below = (
        json.dumps({"terms": [term], "condition": condition | {side: projection / 2}})
        for side in ("above", "below")
    )
    late = {"terms": [{"name": "v0", "dose": 1.0, "blocks": [3]}], "start": 20}
    return [
        case(""),
        case("v0=1.0:3"),
        case("v1=0.5:0-7,v2=-0.7:4"),
        case("v3=1.0:2/prompt"),
        case("v4=1.0:5/decode"),
        case(""),
        # What is added at one block and ablated at the next: what random streams have is too little.
        case("v5=1.0:2,v5=1.0:3!ablate", wrong="v5=1.0:2"),
        case("v6=0.8:4!clamp"),
        case("v7=1.0:2!turn"),
        case(json.dumps(late)),
        case(above),
        Case(below, right="", wrong=below),
    ]


DEVICE = os.environ.get("CHECKED_ON", "cuda")
SPANS = ["3-12", "last", "decode"]
CONDITIONAL = (10, 11)
OFF = 1.5
"""How many times as far off as transformers' bfloat16 the engine may be."""


def main() -> None:
    """Start vLLM in a process with the plugin's environment, and compare there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=["small", "small-hybrid"], default="small")
    parser.add_argument("--work", type=Path)
    given = parser.parse_args()
    if given.work:
        check(given.work, given.shape)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        found = environment(Path(folder), plugin=True, operators="all", capture=True)
        command = [sys.executable, __file__, "--work", folder, "--shape", given.shape]
        sys.exit(os.spawnve(os.P_WAIT, sys.executable, command, found))


def check(work: Path, shape: str) -> None:
    """Compare everything; leave with 1 where anything is wrong."""
    exact, rounded = references(make_model(work, shape), work)
    prompts = prompts_of(12)
    wanted = cases(vectors_of(work, SHAPES[shape], exact, prompts))
    llm = start(
        work / shape,
        max_logprobs=5,
        gpu_memory_utilization=0.05,  # replaced by what follows
        kv_cache_memory_bytes=2**30,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]},
    )
    print(json.dumps(llm.collective_rpc("workbench_hello")[0], indent=1))
    steered = [
        {"steer": one.text, "steer_id": f"id{n}"} if one.text else {}
        for n, one in enumerate(wanted)
    ]
    captured = [
        # What a condition reads is captured, too: a request has one or the other.
        {} if n in CONDITIONAL else {"capture": SPANS[n % len(SPANS)], "capture_id": f"c{n}"}
        for n in range(len(wanted))
    ]

    def ask(which: list[int], more: list[dict[str, str]] | None = None) -> list[Any]:
        params = [greedy(steered[n] | (more[n] if more else {})) for n in which]
        given = [{"prompt_token_ids": prompts[n]} for n in which]
        return llm.generate(given, params, use_tqdm=False)

    everything = list(range(len(wanted)))
    together, alone = ask(everything), [ask([n])[0] for n in everything]
    bad = tokens(llm, wanted, prompts, together, alone, exact, rounded)
    together = ask(everything, captured)
    bad += captures(llm, wanted, prompts, together, exact, rounded)
    plain = ask([0], [{"project": "v5:3", "capture_id": "p"}])[0]
    bad += projections(llm, prompts[0], plain, exact)
    if bad:
        sys.exit(f"{bad} cases are wrong")
    print("all agree with transformers")


def make_model(work: Path, shape: str) -> Any:
    """A random model of a shape in bfloat16, saved where vLLM finds it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(work / shape)
    made = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    made.save_pretrained(work / shape)
    return made


def references(model: Any, work: Path) -> tuple[Reference, Reference]:
    """Plain transformers on the device, in float32 and in bfloat16."""
    model = model.to(DEVICE).eval()
    return Reference(copy.deepcopy(model).float(), work), Reference(model, work)


def prompts_of(count: int) -> list[list[int]]:
    """Random prompts, each longer than the one before."""
    draw = random.Random(0)
    return [[draw.randrange(2, 2048) for _ in range(17 + 3 * n)] for n in range(count)]


def greedy(extra: dict[str, str]) -> Any:
    """Sampling parameters of a request that is compared, with its extra arguments."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0,
        max_tokens=24,
        ignore_eos=True,
        logprobs=1,
        detokenize=False,
        extra_args=extra or None,
    )


def ids_of(reply: Any) -> list[int]:
    """The tokens of a reply."""
    return list(reply.outputs[0].token_ids)


def logprobs_of(reply: Any) -> list[float]:
    """The log-probability of each of its tokens."""
    rows = reply.outputs[0].logprobs
    return [row[t].logprob for row, t in zip(rows, ids_of(reply), strict=True)]


def off(found: list[float], true: list[float]) -> list[float]:
    """How far each value is from the true one."""
    return [abs(a - b) for a, b in zip(found, true, strict=True)]


def tokens(
    llm: Any,
    wanted: list[Case],
    prompts: Any,
    together: list[Any],
    alone: list[Any],
    exact: Reference,
    rounded: Reference,
) -> int:
    """Log-probabilities of the tokens of each case; how many cases are wrong."""
    ours, theirs, wrong = [], [], []
    for n, (one, reply) in enumerate(zip(wanted, together, strict=True)):
        ids = ids_of(reply)
        logprobs = logprobs_of(reply)
        true = exact.logprobs(prompts[n], ids, one.right)
        ours.append(off(logprobs, true))
        theirs.append(off(rounded.logprobs(prompts[n], ids, one.right), true))
        wrong.append(off(logprobs, exact.logprobs(prompts[n], ids, one.wrong)))
    usual, most = max(map(statistics.median, theirs)), max(map(max, theirs))
    print(f"transformers in bfloat16: at most {most:.3f} off, {usual:.4f} at a case's median")
    print(f"{'case':64} {'worst':>7} {'median':>7} {'if wrong':>9} {'alone':>6}  receipt")
    bad = 0
    for n, one in enumerate(wanted):
        receipt = llm.collective_rpc("workbench_receipt", args=(f"id{n}",))[0]
        worst, median = max(ours[n]), statistics.median(ours[n])
        if_wrong = statistics.median(wrong[n])
        right = median <= OFF * usual and worst <= 2 * OFF * most
        if one.right != one.wrong:
            right &= if_wrong > 3 * median
        if one.right and one.text:
            right &= receipt["least"] > 0
        elif one.text:
            right &= receipt["declined"] > 0
        same = ids_of(together[n]) == ids_of(alone[n])
        bad += not right
        flag = "" if right else "   WRONG"
        print(
            f"{one.text[:64]:64} {worst:7.3f} {median:7.4f} {if_wrong:9.3f} "
            f"{same!s:>6}  {receipt}{flag}"
        )
    return bad


def captures(
    llm: Any,
    wanted: list[Case],
    prompts: Any,
    replies: list[Any],
    exact: Reference,
    rounded: Reference,
) -> int:
    """Captured means of a mixed batch, of which half is steered; how many are wrong."""
    from safetensors.torch import load

    errors: list[tuple[str, float, float, float]] = []
    for n, one in enumerate(wanted):
        if n in CONDITIONAL:
            continue
        data, why = llm.collective_rpc("workbench_captures", args=([f"c{n}"],))[0]
        if why:
            sys.exit(f"capture of {one.text!r}: {why}")
        found_LD, span = load(data)[f"c{n}.mean"], SPANS[n % len(SPANS)]
        length, ids = len(prompts[n]), ids_of(replies[n])
        places = {"last": (length - 1, length), "decode": (length, length + 23)}
        first, last = places.get(span, (3, 13))
        true_LTD, theirs_LTD = (
            reference.stream(prompts[n], ids, one.right).float().cpu()
            for reference in (exact, rounded)
        )
        true_LD, theirs_LD = (h[:, first:last].mean(1) for h in (true_LTD, theirs_LTD))
        wrong = true_LD.roll(1, 0), true_LTD[:, first - 1 : last - 1].mean(1)
        ours, theirs, *if_wrong = (
            float((found - true_LD).norm() / true_LD.norm())
            for found in (found_LD, theirs_LD, *wrong)
        )
        errors.append((f"capture {span:7} of {one.text[:40]:40}", ours, theirs, min(if_wrong)))
    median, usual = (statistics.median(error[n] for error in errors) for n in (1, 2))
    # Which way one token's rounding falls can double what a prompt is off, in transformers as here.
    most = 2 * OFF * max(theirs for _, _, theirs, _ in errors)
    print(f"{'':55} {'off':>7} {'bf16':>7} {'another block or token':>24}")
    bad = int(not median <= OFF * usual)
    for words, ours, theirs, if_wrong in errors:
        right = ours <= most and if_wrong > 2 * ours
        bad += not right
        print(f"{words} {ours:7.4f} {theirs:7.4f} {if_wrong:24.2f}{'' if right else '   WRONG'}")
    print(f"{'median':55} {median:7.4f} {usual:7.4f}")
    return bad


def projections(llm: Any, prompt: list[int], reply: Any, reference: Reference) -> int:
    """Projections of the tokens of a plain reply; 1 if they are wrong."""
    from safetensors.torch import load

    data, why = llm.collective_rpc("workbench_captures", args=(["p"],))[0]
    if why:
        print(f"projection: {why}")
        return 1
    found_T = load(data)["p.projection"]
    _, vector = reference.library.load_vector("v5")
    stream_TD = reference.stream(prompt, ids_of(reply), "")[3, len(prompt) : len(prompt) + 23]
    unit_D = vector.directions[3] / vector.directions[3].norm()
    true_T = (stream_TD.float().cpu() @ unit_D) / vector.mean_norms[3]
    error = float((found_T - true_T).abs().max())
    print(
        f"projections of {len(found_T)} tokens: at most {error:.4f} off, {float(true_T.std()):.3f} spread"
    )
    return int(not error < 0.1 * float(true_T.std()) + 0.01 or len(found_T) != 23)


def vectors_of(
    work: Path, shape: dict[str, Any], exact: Reference, prompts: list[list[int]]
) -> float:
    """Save eight vectors: random ones, and v5, the mean of the stream over the prompts.

    Returns the least projection of a conditional prompt's mean on v5 at block 3, in mean norms.
    """
    import torch

    streams_LTD = [exact.stream(prompt, [], "").float().cpu() for prompt in prompts]
    means_NLD = torch.stack([stream_LTD.mean(1) for stream_LTD in streams_LTD])
    norms_L = torch.cat(streams_LTD, 1).norm(dim=-1).mean(1)
    units_LD = torch.nn.functional.normalize(means_NLD.mean(0), dim=-1)
    save_vectors(work, 8, shape, dict(enumerate(norms_L.tolist())), {5: dict(enumerate(units_LD))})
    return float((means_NLD[list(CONDITIONAL), 3] @ units_LD[3]).min() / norms_L[3])


class Reference:
    """Plain transformers with hooks that apply the reference of the operators."""

    def __init__(self, model: Any, work: Path) -> None:
        from vectors.store import Library

        self.model = model
        self.library = Library(work / "library")

    def logprobs(self, prompt: list[int], ids: list[int], text: str) -> list[float]:
        """Of each token of a reply."""
        logits = self._run(prompt, ids, text).logits[0].float()
        logp = logits.log_softmax(-1)
        return [float(logp[len(prompt) - 1 + i, t]) for i, t in enumerate(ids)]

    def stream(self, prompt: list[int], ids: list[int], text: str) -> Any:
        """The residual stream `[L, T, D]` behind each block, edits included."""
        import torch

        seen: list[Any] = []

        def read(module: Any, inputs: Any, output: Any) -> None:
            seen.append((output if isinstance(output, torch.Tensor) else output[0])[0].clone())

        self._run(prompt, ids, text, read)
        return torch.stack(seen)

    def _run(self, prompt: list[int], ids: list[int], text: str, read: Any = None) -> Any:
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
        if read is not None:  # behind the edits, whose hooks run first
            hooks += [layer.register_forward_hook(read) for layer in self.model.model.layers]
        with torch.inference_mode():
            found = self.model(torch.tensor([whole], device=DEVICE), use_cache=False)
        for handle in hooks:
            handle.remove()
        return found


if __name__ == "__main__":
    main()
