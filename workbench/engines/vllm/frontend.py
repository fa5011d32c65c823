"""The front end's part: resolve names, refuse bad ones, and keep steered prefixes apart.

`InputProcessor.process_inputs` sees every request of the server and of the offline class. vLLM's
own validation error, raised there, reaches a client as a 400; a plain ValueError as an empty 500.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

from vectors.errors import WorkbenchError
from vectors.store import Library
from workbench.engines.vllm.spec import STEER, receipt_id, resolve_request

__all__ = ["LIBRARY", "install"]

LIBRARY = "WORKBENCH_LIBRARY"
BASE = "WORKBENCH_BASE"


def install() -> None:
    """Wrap `InputProcessor.process_inputs`, once."""
    from vllm.exceptions import VLLMValidationError  # noqa: PLC0415
    from vllm.v1.engine.input_processor import InputProcessor  # noqa: PLC0415

    original = InputProcessor.process_inputs
    if getattr(original, "workbench", False):
        return
    library = Library(Path(os.environ[LIBRARY]))
    base = os.environ[BASE]

    @functools.wraps(original)
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kw: Any
    ) -> Any:
        extra = getattr(params, "extra_args", None) or {}
        if STEER not in extra:
            return original(self, request_id, prompt, params, *args, **kw)
        try:
            receipt_id(extra)
            resolved = resolve_request(extra[STEER], library, base)
        except WorkbenchError as error:
            raise VLLMValidationError(str(error), parameter=STEER) from error
        params.extra_args = {**extra, STEER: resolved.to_json()}
        request = original(self, request_id, prompt, params, *args, **kw)
        if resolved.injections:
            request.cache_salt = salted(request.cache_salt, resolved.digest)
        return request

    process_inputs.workbench = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = process_inputs


def salted(salt: str | None, digest: str) -> str:
    """The client's own salt and ours, as one that fits vLLM's 128 characters."""
    return hashlib.sha256(f"{salt or ''}\n{digest}".encode()).hexdigest()
