"""What vLLM's offline class `LLM` needs to steer: its environment, and the class of its workers."""

from __future__ import annotations

from pathlib import Path

from workbench.engines.vllm.settings import BASE, LIBRARY

__all__ = ["WORKER", "offline_environment"]

WORKER = "workbench.engines.vllm.worker.WorkbenchWorker"
"""The `worker_extension_cls` that gives out receipts and what was captured."""
PLUGIN = "workbench_steering"


def offline_environment(library: Path, base: str) -> dict[str, str]:
    """What the plugin reads, for `os.environ` before an `LLM` is made.

    Args:
        library: where the vectors lie that requests name.
        base: digest of the model that is loaded; it steers by vectors of this base alone.
    """
    return {BASE: base, LIBRARY: str(library), "VLLM_PLUGINS": PLUGIN}
