"""A vLLM that was started without the workbench's settings, while the package is installed.

It stays as it is, but for requests that ask for steering or capture: they would be answered as if they
had asked for nothing, and are refused.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from workbench.engines.vllm import beam
from workbench.engines.vllm.capture.spec import CAPTURE, PROJECT
from workbench.engines.vllm.spec import STEER

__all__ = ["install"]

log = logging.getLogger("vllm.workbench")


def install() -> None:
    """Wrap `InputProcessor.process_inputs`, once."""
    try:
        _wrap()
    except (ImportError, AttributeError) as error:
        # Nobody's own vLLM must end because the package lies beside it.
        log.error("This vLLM answers requests with 'steer' or 'capture' unsteered (%s).", error)


def _wrap() -> None:
    from vllm.exceptions import VLLMValidationError  # noqa: PLC0415
    from vllm.v1.engine.input_processor import InputProcessor  # noqa: PLC0415

    original = InputProcessor.process_inputs
    if getattr(original, "workbench_unset", False):
        return
    beam.refuse()

    @functools.wraps(original)
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kw: Any
    ) -> Any:
        asked = {STEER, CAPTURE, PROJECT} & set(getattr(params, "extra_args", None) or {})
        if asked:
            raise VLLMValidationError(
                f"This engine was started without the workbench's settings and cannot '{min(asked)}'; "
                "start it with 'workbench serve', or offline with the environment that "
                "workbench.engines.vllm.offline.offline_environment makes.",
                parameter=min(asked),
            )
        return original(self, request_id, prompt, params, *args, **kw)

    process_inputs.workbench_unset = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = process_inputs
