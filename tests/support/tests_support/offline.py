"""vLLM's offline class with the plugin, as a script: a plan on stdin, what came out on stdout.

A plan is `[{"folder": ..., "options": {...}, "steps": [[request, ...], ...]}, ...]`; the requests of a
step run together. `"lost"` in place of a step's first request makes the worker miss one vector, and
`"lost on one of two"` makes the second of two workers miss it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from workbench.engines.vllm.offline import WORKER, offline_environment

__all__ = ["environment"]

READ = {"capture", "project"}


def environment(library: Path, base: str, cache: Path, **more: str) -> dict[str, str]:
    """What the plugin and vLLM read."""
    ours = {
        **offline_environment(library, base),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # Two workers need no cores of their own here.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    return {**os.environ, **ours, **more}


def main() -> None:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.models import registry
    from vllm.v1.core.sched.scheduler import Scheduler

    preempt = Scheduler._preempt_request

    def counted(*args: Any, **kw: Any) -> Any:
        counted.times += 1
        return preempt(*args, **kw)

    Scheduler._preempt_request = counted
    told_of_drafts = Scheduler.make_spec_decoding_stats

    def drafts(*args: Any, **kw: Any) -> Any:
        drafts.accepted += kw["num_accepted_tokens"]
        drafts.refused += kw["num_draft_tokens"] - kw["num_accepted_tokens"]
        return told_of_drafts(*args, **kw)

    Scheduler.make_spec_decoding_stats = drafts
    # vLLM asks another process what a model's class can do, 11 s each, to keep CUDA out of this one.
    registry._run_in_subprocess = lambda ask: ask()
    found = []
    for engine in json.load(sys.stdin):
        counted.times = drafts.accepted = drafts.refused = 0
        if engine["options"].get("async_scheduling"):
            schedule_ahead()
        llm = LLM(
            engine["folder"],
            enforce_eager=True,
            skip_tokenizer_init=True,
            worker_extension_cls=WORKER,
            **engine["options"],
        )
        hello = llm.collective_rpc("workbench_hello")
        steps = [step(llm, requests) for requests in engine["steps"]]
        core = llm.llm_engine.engine_core
        found.append(
            {
                "hello": hello[0],
                "workers": len(hello),
                "steps": steps,
                "preempted": counted.times,
                "drafts": [drafts.accepted, drafts.refused],
                "scheduler": type(core.engine_core.scheduler).__name__,
            }
        )
        core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
    print("\n" + json.dumps(found))


def step(llm: Any, requests: list[Any]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    if requests[0] == "lost":
        lose_one()
        requests = requests[1:]
    if requests[0] == "lost on one of two":
        llm.collective_rpc(lose_on_the_second)
        requests = requests[1:]
    prompts, params = [], []
    for number, request in enumerate(requests):
        prompts.append({"prompt_token_ids": request["ids"]})
        if "salt" in request:
            prompts[-1]["cache_salt"] = request["salt"]
        params.append(
            SamplingParams(
                n=request.get("n", 1),
                # vLLM takes n > 1 for sampling alone; among one token it leaves no choice.
                temperature=1 if request.get("n") else 0,
                top_k=1,
                max_tokens=request.get("tokens", 1),
                prompt_logprobs=0 if request.get("score") else None,
                ignore_eos=True,
                detokenize=False,
                extra_args=extra_of(request, number),
            )
        )
    shared = all(request.get("share") for request in requests)
    answers = llm.generate(prompts, params[0] if shared else params, use_tqdm=False)
    found = [told(request, out) for request, out in zip(requests, answers, strict=True)]
    for number, (request, answer) in enumerate(zip(requests, found, strict=True)):
        if "id" in request:
            answer["receipt"] = llm.collective_rpc("workbench_receipt", args=(request["id"],))[0]
        if READ & set(request):
            answer |= captured(llm, f"c{number}")
    return found


def extra_of(request: dict[str, Any], number: int) -> dict[str, str] | None:
    extra: dict[str, str] = {}
    if request.get("steer"):
        extra |= {"steer": request["steer"], "steer_id": request.get("id", "")}
    for key in READ & set(request):
        extra |= {key: request[key], "capture_id": f"c{number}"}
    return extra or None


def captured(llm: Any, name: str) -> dict[str, Any]:
    from safetensors.torch import load

    data, problem = llm.collective_rpc("workbench_captures", args=([name],))[0]
    tensors = load(bytes(data)) if data else {}
    return {"problem": problem} | {k.partition(".")[2]: x.tolist() for k, x in tensors.items()}


def told(request: dict[str, Any], out: Any) -> dict[str, Any]:
    first = out.outputs[0]
    answer = {
        "ids": [list(o.token_ids) for o in out.outputs],
        "cached": out.num_cached_tokens,
        "finish": first.finish_reason,
        "why": first.stop_reason,
    }
    if after := request.get("score"):
        rows = zip(out.prompt_logprobs, request["ids"], strict=True)
        answer["score"] = [row[t].logprob for row, t in list(rows)[after:]]
    return answer


def schedule_ahead() -> None:
    """Let vLLM schedule a step while the one before runs, which it leaves out on a CPU.

    What it does then on a GPU's streams is done at once here, where no device works beside the host.
    """
    from contextlib import nullcontext

    import torch
    from vllm.platforms import current_platform

    class Immediate:
        def __init__(self, **kw: Any) -> None:
            pass

        def wait_stream(self, other: Any) -> None:
            pass

        record = synchronize = lambda self: None

    platform = type(current_platform)
    check = platform.check_and_update_config

    def keep(config: Any) -> None:
        wanted = config.scheduler_config.async_scheduling
        check(config)
        config.scheduler_config.async_scheduling = wanted

    platform.check_and_update_config = staticmethod(keep)
    torch.cuda.Event = torch.cuda.Stream = Immediate
    torch.cuda.current_stream = Immediate
    torch.cuda.stream = nullcontext


def lose_one() -> None:
    """The worker's next look into the library finds nothing."""
    from vectors.errors import NameNotFound
    from workbench.engines.vllm.rows import RowBank

    edits = RowBank._edits

    def lost(self: Any, key: Any) -> Any:
        RowBank._edits = edits
        raise NameNotFound("The vector is not in the library.")

    RowBank._edits = lost


def lose_on_the_second(worker: Any) -> None:
    if worker.rank == 1:
        lose_one()


if __name__ == "__main__":
    main()
