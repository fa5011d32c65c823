"""What vLLM's workers do beside their work: test the steering at load, and answer when asked."""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import Any

import vllm

from vectors.errors import BackendUnavailable
from workbench.engines.vllm import lora, reload, runner_v1, runner_v2
from workbench.engines.vllm.selftest import Report, SelfTest, silent_attention
from workbench.engines.vllm.steering import Steering
from workbench.models.blocks import decoder_blocks

__all__ = ["WorkbenchWorker", "install"]


class WorkbenchWorker:
    """Methods for `collective_rpc`; `model_runner` is the worker's own."""

    model_runner: Any

    def workbench_hello(self) -> dict[str, Any]:
        """Show that the plugin is in the worker, on which blocks, and what the self-test found."""
        steering = steering_of(self.model_runner)
        report: Report = self.model_runner.workbench_report
        return {
            "blocks": steering.table.blocks,
            "width": steering.table.width,
            "rows": steering.table.rows - 1,
            "projecting": max(0, steering.table.projecting - 1),
            "capture": steering.captures is not None,
            "runner": type(self.model_runner).__name__,
            "state": type(getattr(self.model_runner, "model_state", None)).__name__,
            "vllm": vllm.__version__,
            "dtype": str(self.model_runner.dtype).removeprefix("torch."),
            "selftest": asdict(report),
            "lora": lora.room(self.model_runner),
        }

    def workbench_lora(self, name: str, number: int, folder: str) -> dict[str, float]:
        """Load a LoRA, and say what lies in its slot then: `modules` and their `norm`."""
        return lora.load(self.model_runner, name, number, folder)

    def workbench_receipt(self, receipt: str) -> dict[str, int | float | str | None]:
        """Take the receipt of the requests that were sent under this id."""
        return steering_of(self.model_runner).receipt(receipt)

    def workbench_captures(self, names: list[str]) -> tuple[bytes, str]:
        """Take what was captured under these ids, as safetensors, or the reason why that cannot be."""
        captures = steering_of(self.model_runner).captures
        if captures is None:
            return b"", "This engine was started without capture."
        return captures.take(names)

    def workbench_projections(
        self, since: dict[str, int], ended: list[str]
    ) -> dict[str, tuple[list[float], str]]:
        """What is known of replies that are being written; see `Captures.projections`."""
        captures = steering_of(self.model_runner).captures
        return {} if captures is None else captures.projections(since, ended)

    def workbench_forget(self, names: list[str]) -> None:
        """Drop what requests that the server names so have read; nobody will fetch it."""
        if (captures := steering_of(self.model_runner).captures) is not None:
            captures.forget(names)


def steering_of(runner: Any) -> Steering:
    """The steering of a model runner, of either kind.

    Raises:
        BackendUnavailable: vLLM runs the model in a way that the plugin has not got hold of.
    """
    holder = getattr(runner, "model_state", runner)
    steering = getattr(holder, "workbench_steering", None)
    if steering is None:
        raise BackendUnavailable(
            f"The steering plugin is not attached to this {type(runner).__module__} runner; "
            "install the vLLM version that the workbench was tested with."
        )
    return steering


def install() -> None:
    """Run the self-test when a worker has warmed up; its failure ends the engine. Reload beside LoRAs."""
    from vllm.platforms import current_platform  # noqa: PLC0415

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker as Worker  # noqa: PLC0415
    else:
        from vllm.v1.worker.gpu_worker import Worker  # noqa: PLC0415
    original = Worker.compile_or_warm_up_model
    if not getattr(original, "workbench", False):
        Worker.compile_or_warm_up_model = _tested(original)
    reload.install(Worker)


def _tested(original: Any) -> Any:
    @functools.wraps(original)
    def compile_or_warm_up_model(self: Any) -> Any:
        # Before vLLM has warmed up: afterwards it warns of kernels that are compiled.
        steering_of(self.model_runner).warm_up()
        out = original(self)
        self.model_runner.workbench_report = selftest(self.model_runner)
        return out

    compile_or_warm_up_model.workbench = True  # type: ignore[attr-defined]
    return compile_or_warm_up_model


def selftest(runner: Any) -> Report:
    """Test the steering of a model runner that runs no request.

    Raises:
        SteeringNotApplied: the model is not steered as it should be.
    """
    steering = steering_of(runner)
    paths = (runner_v2 if hasattr(runner, "model_state") else runner_v1).paths(runner)
    attention = runner.compilation_config.static_forward_context.values()
    with silent_attention(attention):
        return SelfTest(
            runner.model,
            decoder_blocks(runner.model),
            steering,
            paths["compiled"],
            paths,
            min(runner.max_num_tokens, runner.max_num_reqs),
        ).run()
