"""Steering, conditions and capture in real vLLM on a CUDA device, compared with plain transformers.

    python benchmarks/_gpu_steering_check.py [--shape small|small-hybrid]

A small random model, compiled, with full CUDA graphs: a mixed batch of plain and steered requests, phases,
operators and conditions; the log-probability of every token is compared with transformers with hooks, and
with what no vector would give. Then captured means and projections of tokens are compared with hooks'.
Exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from _gpu_engine import BASE, SHAPES, environment, prepare, save_vectors, start

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
    '{"terms": [{"name": "v1", "dose": 1.0, "blocks": [3], "phase": "decode"}], '
    '"condition": {"name": "v5", "block": 3, "above": 0.01}}',
    '{"terms": [{"name": "v1", "dose": 1.0, "blocks": [3], "phase": "decode"}], '
    '"condition": {"name": "v5", "block": 3, "below": 0.01}}',
]
SPANS = ["3-12", "last", "decode"]
DECLINED = len(CASES) - 1
"""v5 is what the stream has much of, so that its projection on it is above: this one stays unsteered."""


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
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from vllm import SamplingParams

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(work / shape)
    made = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    made.save_pretrained(work / shape)
    made = made.to("cuda").eval()
    vectors_of(work, SHAPES[shape], made)
    llm = start(
        work / shape,
        max_logprobs=5,
        gpu_memory_utilization=0.05,  # replaced by what follows
        kv_cache_memory_bytes=2**30,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]},
    )
    print(json.dumps(llm.collective_rpc("workbench_hello")[0], indent=1))
    draw = random.Random(0)
    prompts = [[draw.randrange(2, 2048) for _ in range(17 + 3 * n)] for n in range(len(CASES))]
    wanted = [{"steer": text, "steer_id": f"id{n}"} if text else {} for n, text in enumerate(CASES)]
    captured = [
        # What a condition reads is captured, too: a request has one or the other.
        {} if "condition" in CASES[n] else {"capture": SPANS[n % len(SPANS)], "capture_id": f"c{n}"}
        for n in range(len(CASES))
    ]

    def ask(which: list[int], more: list[dict[str, str]] | None = None) -> list[Any]:
        params = [
            SamplingParams(
                temperature=0.0,
                max_tokens=24,
                ignore_eos=True,
                logprobs=1,
                detokenize=False,
                extra_args=(wanted[n] | (more[n] if more else {})) or None,
            )
            for n in which
        ]
        return llm.generate([{"prompt_token_ids": prompts[n]} for n in which], params)

    together = ask(list(range(len(CASES))))
    reference = Reference(made, work)
    bad = tokens(llm, prompts, together, [ask([n])[0] for n in range(len(CASES))], reference)
    together = ask(list(range(len(CASES))), captured)
    bad += captures(llm, prompts, together, reference)
    plain = ask([0], [{"project": "v5:3", "capture_id": "p"}])[0]
    bad += projections(llm, prompts[0], plain, reference)
    if bad:
        sys.exit(f"{bad} cases are wrong")
    print("all agree with transformers")


def ids_of(reply: Any) -> list[int]:
    """The tokens of a reply."""
    return list(reply.outputs[0].token_ids)


def tokens(
    llm: Any, prompts: Any, together: list[Any], alone: list[Any], reference: Reference
) -> int:
    """Log-probabilities of the tokens of each case; how many cases are wrong."""
    receipts = [
        llm.collective_rpc("workbench_receipt", args=(f"id{n}",))[0] for n in range(len(CASES))
    ]
    errors, wrong = [], []
    for n, (text, one) in enumerate(zip(CASES, together, strict=True)):
        ids = ids_of(one)
        ours = [row[t].logprob for row, t in zip(one.outputs[0].logprobs, ids, strict=True)]
        for found, how in ((errors, "" if n == DECLINED else text), (wrong, "")):
            theirs = reference.logprobs(prompts[n], ids, how)
            found.append([abs(a - b) for a, b in zip(ours, theirs, strict=True)])
    # What rounding alone does, on this device and in this dtype, the unsteered cases show.
    rounding = max(statistics.median(e) for e, text in zip(errors, CASES, strict=True) if not text)
    bad = 0
    print(f"{'case':64} {'worst':>7} {'median':>7} {'unsteered':>9} {'alone':>6}  receipt")
    for n, text in enumerate(CASES):
        worst, median = max(errors[n]), statistics.median(errors[n])
        unsteered = statistics.median(wrong[n])
        same = ids_of(together[n]) == ids_of(alone[n])
        right = median <= 1.5 * rounding and worst < 0.5
        if n == DECLINED:
            right &= receipts[n]["declined"] > 0
        elif text:
            right &= unsteered > 3 * median and receipts[n]["least"] > 0
        bad += not right
        flag = "" if right else "   WRONG"
        print(
            f"{text[:64]:64} {worst:7.3f} {median:7.4f} {unsteered:9.3f} "
            f"{same!s:>6}  {receipts[n]}{flag}"
        )
    return bad


def captures(llm: Any, prompts: Any, replies: list[Any], reference: Reference) -> int:
    """Captured means of a mixed batch, of which half is steered; how many are wrong."""
    import torch
    from safetensors.torch import load

    bad = 0
    for n, text in enumerate(CASES):
        if "condition" in text:
            continue
        data, why = llm.collective_rpc("workbench_captures", args=([f"c{n}"],))[0]
        if why:
            print(f"capture of {text!r}: {why}")
            bad += 1
            continue
        found_LD = load(data)[f"c{n}.mean"]
        span = SPANS[n % len(SPANS)]
        length, ids = len(prompts[n]), ids_of(replies[n])
        first, last = {"last": (length - 1, length), "decode": (length, length + 23)}.get(
            span, (3, 13)
        )
        stream_LTD = reference.stream(prompts[n], ids, text)
        true_LD = stream_LTD[:, first:last].mean(1).float().cpu()
        error = float((found_LD - true_LD).norm() / true_LD.norm())
        random_error = float((found_LD - true_LD.roll(1, 0)).norm() / true_LD.norm())
        right = error < 0.02 and torch.isfinite(found_LD).all()
        bad += not right
        flag = "" if right else "   WRONG"
        print(
            f"capture {span:7} of {text[:40]:40} {error:.4f} (other block {random_error:.2f}){flag}"
        )
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


def vectors_of(work: Path, shape: dict[str, Any], model: Any) -> None:
    """Eight vectors: random ones, and v5, the mean of the stream over some random text."""
    import torch

    ids = torch.randint(2, 2000, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        states = model(ids.to("cuda"), output_hidden_states=True).hidden_states
    stream = {b: states[b + 1].float().cpu().flatten(0, 1) for b in range(len(states) - 1)}
    means = {b: stream_TD.mean(0) for b, stream_TD in stream.items()}
    norms = {b: float(stream_TD.norm(dim=-1).mean()) for b, stream_TD in stream.items()}
    units = {b: mean_D / mean_D.norm() for b, mean_D in means.items()}
    save_vectors(work, 8, shape, norms, {5: units})


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
            found = self.model(torch.tensor([whole], device="cuda"), use_cache=False)
        for handle in hooks:
            handle.remove()
        return found


if __name__ == "__main__":
    main()
