"""What vLLM loads into each of its processes: front end, engine core and workers.

vLLM swallows a plugin that cannot be imported, so nothing here is taken on trust: the server counts
as ready only when `endpoints.hello` has answered from a worker (see `server`), and a worker serves
only after the self-test.
"""

from __future__ import annotations

import os

from workbench.engines.vllm.watchdog import die_with_supervisor

__all__ = ["ACTIVE", "register"]

ACTIVE = "WORKBENCH_BASE"
"""The variable that our server sets; without it the plugin only refuses what is meant for it."""


def register() -> None:
    """Entry point `vllm.general_plugins`; may be called more than once in a process.

    Raises:
        BackendUnavailable: a vLLM that the plugin was not tested with.
    """
    if ACTIVE not in os.environ:
        from workbench.engines.vllm import unset  # noqa: PLC0415

        unset.install()
        return
    die_with_supervisor()
    from vllm.platforms import current_platform  # noqa: PLC0415

    from workbench.engines.vllm import versions  # noqa: PLC0415  # vLLM is importable here

    versions.check_version()
    from workbench.engines.vllm import (  # noqa: PLC0415
        absent,
        admission,
        compiling,
        frontend,
        lora_cpu,
        refusal,
        runner_v1,
        worker,
    )
    from workbench.engines.vllm.capture import frontend as capture_frontend  # noqa: PLC0415

    absent.install()
    frontend.install()
    capture_frontend.install()
    admission.install()
    refusal.install()
    compiling.install()
    runner_v1.install()
    if versions.has_runner_v2():
        from workbench.engines.vllm import runner_v2  # noqa: PLC0415

        runner_v2.install()
    worker.install()
    if current_platform.is_cpu():
        lora_cpu.install()
