"""vLLM's offline class with the plugin, as a script: a plan on stdin, what came out on stdout.

A plan is `[{"folder": ..., "options": {...}, "steps": [[request, ...], ...]}, ...]`; the requests of a
step run together, and `"lost"` in place of a step's first request makes the worker miss one vector.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

__all__ = ["environment"]

READ = {"capture", "project"}


def environment(library: Path, base: str, cache: Path, **more: str) -> dict[str, str]:
    """What the plugin and vLLM read."""
    ours = {
        "WORKBENCH_BASE": base,
        "WORKBENCH_LIBRARY": str(library),
        "VLLM_PLUGINS": "workbench_steering",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
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
    # vLLM asks another process what a model's class can do, 11 s each, to keep CUDA out of this one.
    registry._run_in_subprocess = lambda ask: ask()
    found = []
    for engine in json.load(sys.stdin):
        counted.times = 0
        llm = LLM(
            engine["folder"],
            enforce_eager=True,
            skip_tokenizer_init=True,
            worker_extension_cls="workbench.engines.vllm.worker.WorkbenchWorker",
            **engine["options"],
        )
        hello = llm.collective_rpc("workbench_hello")[0]
        steps = [step(llm, requests) for requests in engine["steps"]]
        found.append({"hello": hello, "steps": steps, "preempted": counted.times})
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
    print("\n" + json.dumps(found))


def step(llm: Any, requests: list[Any]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    if requests[0] == "lost":
        lose_one()
        requests = requests[1:]
    prompts, params = [], []
    for number, request in enumerate(requests):
        prompts.append({"prompt_token_ids": request["ids"]})
        if "salt" in request:
            prompts[-1]["cache_salt"] = request["salt"]
        extra = {"steer": request["steer"]} if request.get("steer") else {}
        for key in READ & set(request):
            extra |= {key: request[key], "capture_id": f"c{number}"}
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
                extra_args=extra or None,
            )
        )
    shared = all(request.get("share") for request in requests)
    answers = llm.generate(prompts, params[0] if shared else params, use_tqdm=False)
    found = [told(request, out) for request, out in zip(requests, answers, strict=True)]
    for number, request in enumerate(requests):
        if READ & set(request):
            found[number] |= captured(llm, f"c{number}")
    return found


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


def lose_one() -> None:
    """The worker's next look into the library finds nothing."""
    from vectors.errors import NameNotFound
    from workbench.engines.vllm.rows import RowBank

    edits = RowBank._edits

    def lost(self: Any, key: Any) -> Any:
        RowBank._edits = edits
        raise NameNotFound("The vector is not in the library.")

    RowBank._edits = lost


if __name__ == "__main__":
    main()
