"""Keep what vLLM compiles with the edit apart from what it compiles without.

vLLM's compile cache does not know of plugins; what stands in `additional_config` is part of its key.
"""

from __future__ import annotations

import functools
from typing import Any

from vectors.errors import InputError
from workbench.engines.vllm.settings import Settings

__all__ = ["SALT", "install"]

SALT = "workbench_steering"


def install() -> None:
    """Wrap `EngineArgs.create_engine_config`, once."""
    from vllm.engine.arg_utils import EngineArgs  # noqa: PLC0415

    original = EngineArgs.create_engine_config
    if getattr(original, "workbench", False):
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kw: Any) -> Any:
        config = original(self, *args, **kw)
        if not isinstance(config.additional_config, dict):
            raise InputError("vLLM's additional_config must be a dictionary beside steering.")
        config.additional_config = {
            **config.additional_config,
            SALT: Settings.of_environment().salt(),
        }
        return config

    create_engine_config.workbench = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config
