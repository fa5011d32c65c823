"""Frozen-context training against prompt-masked training of the same decisions.

    workbench bench frozen-context [--json] [--context 1024] [--decision 64] [--repeats 3]
    python benchmarks/frozen_context.py [--parts hybrid,dense] [--layers 36] [--profile]  # on a GPU

On a CPU it takes the model in use (the bundled one unless named) in float32; on a GPU a Qwen3.5-like
model of 0.8B and a dense one of 8B, random, in bfloat16, with a context of 8,192 and a decision of
256. Gradients are compared first, against one plain graph in which keys, values and states of the
context are detached: in float32, frozen and reused; on a GPU also the kernels in bfloat16, one by one
and recorded with the elementwise work compiled, formed and as factors, which may be off by little more
than transformers' own bfloat16 is. If they differ, nothing is timed.

Then, best of the repeats: forward and backward of the whole sequence with the loss on the decision
(prompt-masked), of the frozen context read anew, and of the context reused, by the kernels where they
run and without them (`reused_plain`). `step` is a whole step of training on a reused context with
clipping and APOLLO, and `recorded_step` the same recorded as CUDA graphs, `recorded_plain_step` without
the compiled parts; `replay` is the GPU's part of `recorded_step`. Memory is the peak of what a forward
and backward pass holds beyond weights, gradients and context; of the record, all that it keeps, with
its gradients.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from _results import RESULTS, publish
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.models.qwen3_5 import modeling_qwen3_5

from workbench.train import recorded, step
from workbench.train.apollo import Apollo
from workbench.train.batches import Batch, Decision, collate
from workbench.train.factored import factors_of
from workbench.train.frozen import FrozenContext, freeze_context
from workbench.train.memory import peak_bytes
from workbench.train.modes import training
from workbench.train.recorded import RecordedSteps
from workbench.train.step import Read, decision_loss, take_step

CUDA = torch.cuda.is_available()
ENOUGH = 2e-3 if CUDA else 1e-4
"""Error of a gradient in float32; on a GPU, kernels of other packages round to tf32."""
LONG = 4.0
"""Seconds after which a measurement is not repeated."""
WORSE = 1.5
"""How many times the error of transformers' bfloat16 the kernels' may be."""
DETACHED = ("k_proj", "k_norm", "v_proj", "in_proj_qkv", "in_proj_a", "in_proj_b")


def main() -> None:
    """Verify, time, print, and append to the results file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--context", type=int, default=8192 if CUDA else 1024)
    parser.add_argument("--decision", type=int, default=256 if CUDA else 64)
    parser.add_argument("--repeats", type=int, default=10 if CUDA else 3)
    parser.add_argument("--parts", default="", help="of a GPU: hybrid, dense; default both")
    parser.add_argument(
        "--layers", type=int, default=36, help="of the dense model; 24 fit 80 GB if prompt-masked"
    )
    parser.add_argument("--profile", action="store_true", help="of a GPU: kernels of one replay")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to append to")
    asked = parser.parse_args()
    size = (asked.context, asked.decision, asked.repeats)
    models = {"hybrid": hybrid, "dense": lambda: dense(asked.layers)}
    kinds = asked.parts.split(",") if asked.parts else list(models)
    parts: dict[str, Callable[[], dict[str, Any]]] = {}
    for kind in kinds:
        parts[f"gradient, {kind}"] = lambda kind=kind: checked(small(kind))
        if CUDA:
            parts[f"kernels, {kind}"] = lambda kind=kind: checked_kernels(small(kind, wide=True))
    if CUDA:
        for kind in kinds:
            parts[kind] = lambda make=models[kind]: measured(make(), *size, asked.profile)
    else:
        parts["model"] = lambda: measured(in_use(), *size)
    found: dict[str, Any] = {"context": asked.context, "decision": asked.decision}
    failed = False
    for name, work in parts.items():
        try:
            numbers = work()
        except Exception as error:
            # One part's failure, such as a lack of memory, must not hide the others' numbers.
            numbers = {"error": reason(error)}
            failed = True
        if not asked.json:
            show(name, numbers)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
        found[name] = numbers
        if numbers.get("wrong"):
            raise SystemExit(f"{name}: the gradients differ; there is nothing to time.")
    publish(
        "frozen-context", found, as_json=asked.json, results=asked.results, shown=not asked.json
    )
    if failed:
        raise SystemExit(1)


def measured(
    model: Any, context: int, decision: int, repeats: int, profile: bool = False
) -> dict[str, Any]:
    """Times and memory of the ways to learn one decision after one context."""
    batch = batch_of(model, 1, context, decision)
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    if model.dtype == torch.float32:
        found |= checked(model, context, decision)
    store = Reused()
    ways: dict[str, tuple[int, Read, bool]] = {
        "prompt_masked": (1, freeze_context, True),
        "frozen": (2, freeze_context, True),
        "reused": (2, store, True),
    }
    if CUDA:
        ways["reused_plain"] = (2, store, False)
    with training(model) as weights:
        with torch.no_grad():
            decision_loss(model, batch, None, 2, store)

        def backward(tier: int, read: Read) -> None:
            decision_loss(model, batch, None, tier, read).backward()

        for name, (tier, read, kernels) in ways.items():
            with nullcontext() if kernels else without_kernels(), kept(found, name):
                backward(tier, read)  # gradients and workspaces are there from now on
                seconds = best(lambda tier=tier, read=read: backward(tier, read), repeats)
                found[f"{name}_seconds"] = seconds
                found[f"{name}_bytes"] = peak_bytes(lambda t=tier, r=read: backward(t, r))
            give_back(weights)
        found["prefill_seconds"] = best(
            lambda: freeze_context(model, batch.context_ids_BP, batch.context_mask_BP), repeats
        )
        with kept(found, "step"):
            optimizer = Apollo(weights.values(), lr=1e-9)

            def whole_step() -> None:
                take_step(model, batch, None, list(weights.values()), optimizer, 2, 1.0, store)

            whole_step()
            found["step_seconds"] = best(whole_step, repeats)
            backward(2, store)
            found["optimizer_seconds"] = best(lambda: optimizer.step(), repeats)
            give_back(weights)
            if CUDA:
                found |= replayed(model, weights, optimizer, batch, store, repeats, profile)
    for name in ("frozen", "reused"):
        if {"prompt_masked_seconds", f"{name}_seconds"} <= found.keys():
            plain, step = found["prompt_masked_seconds"], found["optimizer_seconds"]
            found[f"speed_{name}"] = plain / found[f"{name}_seconds"]
            found[f"speed_{name}_step"] = (plain + step) / (found[f"{name}_seconds"] + step)
            found[f"memory_{name}"] = found["prompt_masked_bytes"] / found[f"{name}_bytes"]
    if {"prompt_masked_seconds", "recorded_step_seconds"} <= found.keys():
        whole = found["prompt_masked_seconds"] + found["optimizer_seconds"]
        own = found["recorded_step_seconds"]
        found["speed_recorded_step"] = whole / own
        found["speed_recorded_step_with_prefill"] = whole / (own + found["prefill_seconds"])
    return found


def replayed(
    model: Any,
    weights: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    store: Reused,
    repeats: int,
    profile: bool,
) -> dict[str, Any]:
    """The whole step recorded as CUDA graphs, with the elementwise work compiled and as it is."""
    found: dict[str, Any] = {}
    for name, compiled in (("recorded_plain", False), ("recorded", True)):
        with kept(found, name), nullcontext() if compiled else not_compiled():
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            steps = RecordedSteps(model, weights.values(), optimizer, 1.0)
            found |= one_record(name, lambda s=steps: s.take(batch, None, store), repeats)
            torch.cuda.empty_cache()
            found[f"{name}_bytes"] = torch.cuda.memory_reserved() - before
            (shape,) = steps._shapes.values()
            assert shape.steps is not None and shape.moves is not None
            found[f"{name}_forward_backward_seconds"] = best(shape.steps.replay, repeats)
            found[f"{name}_move_seconds"] = best(shape.moves.replay, repeats)
            if profile:
                show_profile(name, shape.steps.replay)
        steps = shape = None
        gc.collect()
    if "recorded_forward_backward_seconds" in found:
        found["replay_seconds"] = (
            found["recorded_forward_backward_seconds"] + found["recorded_move_seconds"]
        )
    return found


def one_record(name: str, take: Callable[[], object], repeats: int) -> dict[str, Any]:
    """Seconds of the first three steps, which compile and record, and of a later one."""
    began = time.perf_counter()
    for _ in range(3):
        take()
    torch.cuda.synchronize()
    first = time.perf_counter() - began
    return {f"{name}_first_seconds": first, f"{name}_step_seconds": best(take, repeats)}


def checked(model: Any, context: int = 48, decision: int = 16) -> dict[str, Any]:
    """Relative error of the gradient, frozen and reused, against the plain detached graph."""
    batch = batch_of(model, 1, context, decision)
    store = Reused()
    with detached(model, batch.context_ids_BP.shape[1]):
        plain = gradient(model, batch, 1)
    gradient(model, batch, 2, store)
    errors = [off(gradient(model, batch, 2, read), plain) for read in (freeze_context, store)]
    return {"gradient_error": max(errors), "wrong": not max(errors) <= ENOUGH}


def checked_kernels(model: Any, context: int = 1000, decision: int = 250) -> dict[str, Any]:
    """The same in bfloat16: transformers' own, the kernels', and the recorded and compiled ones'."""
    batch = batch_of(model, 1, context, decision)
    half = copy.deepcopy(model).bfloat16()
    model = copy.deepcopy(half).float()
    P = batch.context_ids_BP.shape[1]
    with detached(model, P):
        plain = gradient(model, batch, 1)
    with without_kernels():
        found = {"transformers_error": off(gradient(half, batch, 2), plain)}
    found["kernels_error"] = off(gradient(half, batch, 2), plain)
    with training(half) as weights:
        for kind, keeping in (("factored_", _KeepFactors), ("", _Keep)):
            kept_grads = keeping(weights.values())
            steps = RecordedSteps(half, weights.values(), kept_grads, 1e9)
            for name in ("recorded", "replayed"):
                _, norm = steps.take(batch, None)
                found[f"{kind}{name}_error"] = off(kept_grads.seen, plain)
                # Clipping goes by this norm, which is found without forming factored gradients.
                found[f"{kind}{name}_norm_error"] = abs(norm / float(plain.norm()) - 1)
    limit = WORSE * found["transformers_error"]
    wrong = [name for name, error in found.items() if not error <= limit]
    return {**found, "wrong": ", ".join(wrong)}


class Reused:
    """Reads the context the first time and gives it back from then on."""

    context: FrozenContext | None = None

    def __call__(self, model: Any, ids_BP: Tensor, mask_BP: Tensor) -> FrozenContext:
        if self.context is None:
            self.context = freeze_context(model, ids_BP, mask_BP)
        return self.context


class _Keep(torch.optim.Optimizer):
    """Moves nothing and remembers the gradients."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(list(parameters), {})
        self.seen = torch.empty(0)

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.seen = flat(self.param_groups[0]["params"])


class _KeepFactors(Apollo):
    """The same, of gradients that APOLLO takes as factors."""

    seen = torch.empty(0)

    def prepare(self) -> list[Callable[[], None]]:
        self.seen = flat(self.param_groups[0]["params"])
        assert any(factors_of(p) is not None for p in self.param_groups[0]["params"])
        return []


def gradient(model: Any, batch: Batch, tier: int, read: Read = freeze_context) -> Tensor:
    """The gradient of all parameters, in float64 on the CPU."""
    with training(model) as weights:
        decision_loss(model, batch, None, tier, read).backward()
        return flat(weights.values())


def flat(parameters: Any) -> Tensor:
    """The gradients of parameters, formed or factored, one after the other."""
    kept = [p.grad if (factors := factors_of(p)) is None else factors.dense() for p in parameters]
    return torch.cat([gradient.flatten().double().cpu() for gradient in kept])


def off(found: Tensor, true: Tensor) -> float:
    """Relative error; not a number where anything is."""
    return float((found - true).norm() / true.norm())


@contextmanager
def kept(found: dict[str, Any], name: str) -> Iterator[None]:
    """Note why a way failed and go on: prompt-masked training may lack the memory."""
    try:
        yield
    except Exception as error:
        found[f"{name}_error"] = reason(error)
        torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    """Its first sentence, for the results; all of it goes to the standard error."""
    traceback.print_exception(error)
    return f"{type(error).__name__}: {str(error).partition('. ')[0]}"


def give_back(weights: dict[str, Any]) -> None:
    """Forget the gradients and what the allocator keeps."""
    for parameter in weights.values():
        parameter.grad = None
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


@contextmanager
def without_kernels() -> Iterator[None]:
    """Read contexts as transformers does."""
    own = step.kernels_fit
    step.kernels_fit = lambda model: False
    try:
        yield
    finally:
        step.kernels_fit = own


@contextmanager
def not_compiled() -> Iterator[None]:
    """Record elementwise work as transformers has it."""
    own = recorded.fused
    recorded.fused = lambda *args, **options: nullcontext()
    try:
        yield
    finally:
        recorded.fused = own


def show_profile(name: str, replay: Callable[[], None]) -> None:
    """The kernels that take most of a replay."""
    from torch.profiler import ProfilerActivity, profile  # loads slowly

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        replay()
        torch.cuda.synchronize()
    events = sorted(seen.key_averages(), key=lambda event: -event.device_time_total)
    total = sum(event.device_time_total for event in events)
    print(f"{name}: {total / 1e3:.2f} ms in {sum(event.count for event in events)} launches")
    for event in events[:30]:
        print(f"  {event.device_time_total / 1e3:8.3f} ms {event.count:5} x  {event.key[:100]}")


@contextmanager
def detached(model: Any, P: int) -> Iterator[None]:
    """Make the first P positions of a whole-sequence graph constant where later ones see them."""

    def cut(module: Any, inputs: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:, :P].detach(), output[:, P:]], 1)

    rule = modeling_qwen3_5.torch_chunk_gated_delta_rule

    def two_parts(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any
    ) -> tuple[Tensor, None]:
        options |= {"initial_state": None, "output_final_state": True}
        first, state = rule(*(x[:, :P].detach() for x in (q, k, v, g, beta)), **options)
        options |= {"initial_state": state.detach(), "output_final_state": False}
        second, _ = rule(*(x[:, P:] for x in (q, k, v, g, beta)), **options)
        return torch.cat([first, second], 1), None

    modules = [m for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in DETACHED]
    handles = [module.register_forward_hook(cut) for module in modules]
    modeling_qwen3_5.torch_chunk_gated_delta_rule = two_parts
    try:
        yield
    finally:
        modeling_qwen3_5.torch_chunk_gated_delta_rule = rule
        for handle in handles:
            handle.remove()


def batch_of(model: Any, rows: int, context: int, decision: int) -> Batch:
    """Random decisions; the context's last token belongs to the part with gradients."""
    ids = torch.randint(0, model.config.vocab_size, (rows, context + decision)).tolist()
    made = [Decision(tuple(row[:context]), tuple(row[context:])) for row in ids]
    return collate(made, model.device)


def best(work: Callable[[], object], repeats: int) -> float:
    """Shortest wall-clock time of the repeats, in seconds; fewer repeats of what takes long."""
    times: list[float] = []
    while len(times) < repeats and sum(times) < LONG:
        if CUDA:
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if CUDA:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def small(kind: str, wide: bool = False) -> Any:
    """A seeded float32 model of two or four layers, to compare gradients on.

    `wide` has the heads of the models that are timed, and the hybrid also their widths, so that its
    halves are compiled once for both.
    """
    torch.manual_seed(0)
    shared: dict[str, Any] = {"vocab_size": 256, "max_position_embeddings": 4096}
    if wide:
        shared |= {"hidden_size": 1024, "intermediate_size": 3584}
        shared |= {"num_attention_heads": 8, "num_key_value_heads": 2}
        shared |= {"head_dim": 128 if kind == "dense" else 256}
    else:
        shared |= {"hidden_size": 128, "intermediate_size": 192}
        shared |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    heads, width = (16, 128) if wide else (4, 32)
    with torch.device("cuda" if CUDA else "cpu"):
        if kind == "dense":
            return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **shared)).eval()
        gdn = {"linear_num_key_heads": heads if wide else 2, "linear_num_value_heads": heads}
        gdn |= {"linear_key_head_dim": width, "linear_value_head_dim": width}
        return Qwen3_5ForCausalLM(Qwen3_5TextConfig(num_hidden_layers=4, **gdn, **shared)).eval()


def hybrid() -> Any:
    """Qwen3.5 of 0.8B: 24 layers of width 1,024, three Gated-DeltaNet layers to one of attention."""
    config = Qwen3_5TextConfig(
        vocab_size=248_320,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=16,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
    )
    return random_model(Qwen3_5ForCausalLM, config)


def dense(layers: int) -> Any:
    """Layers of width 4,096 with 32 heads, and 8 for keys and values; 36 make a model of 8B."""
    config = LlamaConfig(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32_768,
    )
    return random_model(LlamaForCausalLM, config)


def random_model(kind: Any, config: Any) -> Any:
    """A bfloat16 model on the GPU, made there."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return kind(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def in_use() -> Any:
    """The model that the command line names, in float32."""
    from workbench.models.loading import load_model  # a GPU needs no model's files
    from workbench.service import Workbench

    return load_model(Workbench().model()).model


def show(name: str, numbers: dict[str, Any]) -> None:
    """One part as lines."""
    print(name)
    for key, value in numbers.items():
        print(f"  {key:<24} {value:.4g}" if isinstance(value, float) else f"  {key:<24} {value}")


if __name__ == "__main__":
    main()
