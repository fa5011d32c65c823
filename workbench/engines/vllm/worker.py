"""What vLLM's workers answer when the server asks; mixed into its worker class by name."""

from __future__ import annotations

from typing import Any

import vllm

from vectors.errors import BackendUnavailable
from workbench.engines.vllm.runner_v1 import steering_of
from workbench.engines.vllm.steering import StepSteering

__all__ = ["WorkbenchWorker"]


class WorkbenchWorker:
    """Methods for `collective_rpc`; `model_runner` is the worker's own."""

    model_runner: Any

    def _workbench(self) -> StepSteering:
        steering = steering_of(self.model_runner)
        if steering is None:
            raise BackendUnavailable(
                "The steering plugin is not attached to this model runner; "
                "install the vLLM version that the workbench was tested with."
            )
        return steering

    def workbench_hello(self) -> dict[str, Any]:
        """Show that the plugin is in the worker, and on which blocks."""
        steering = self._workbench()
        return {
            "blocks": steering.blocks,
            "width": steering.width,
            "runner": type(self.model_runner).__name__,
            "vllm": vllm.__version__,
            "dtype": str(self.model_runner.dtype).removeprefix("torch."),
        }

    def workbench_receipt(self, receipt: str) -> dict[str, int]:
        """Take the receipt of the requests that were sent under this id."""
        return self._workbench().receipt(receipt)
