"""What vLLM loads into each of its processes: front end, engine core and workers.

vLLM swallows a plugin that fails to load, so nothing here is taken on trust: the server counts as
ready only when `endpoints.hello` has answered from a worker (see `server`).
"""

from __future__ import annotations

import os

from workbench.engines.vllm.watchdog import die_with_supervisor

__all__ = ["ACTIVE", "register"]

ACTIVE = "WORKBENCH_BASE"
"""The variable that our server sets; without it the plugin leaves vLLM as it is."""


def register() -> None:
    """Entry point `vllm.general_plugins`; may be called more than once in a process."""
    if ACTIVE not in os.environ:
        return
    die_with_supervisor()
    from workbench.engines.vllm import frontend, runner_v1  # noqa: PLC0415  # vLLM is importable here

    frontend.install()
    runner_v1.install()
