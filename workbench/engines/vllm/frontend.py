"""The front end's part: resolve names, refuse bad ones, and keep steered prefixes apart.

`InputProcessor.process_inputs` sees every request of the server and of the offline class. vLLM's
own validation error, raised there, reaches a client as a 400; a plain ValueError as an empty 500.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

from vectors.errors import GrammarError, WorkbenchError
from vectors.store import Library
from workbench.engines.vllm import beam
from workbench.engines.vllm.capture.frontend import check_engine
from workbench.engines.vllm.capture.spec import CAPTURE, PROJECT
from workbench.engines.vllm.lora import check_folder
from workbench.engines.vllm.resolver import Resolver, shape_of
from workbench.engines.vllm.settings import Settings, library_and_base
from workbench.engines.vllm.spec import STEER, Resolved, as_text, receipt_id

__all__ = ["install"]


def install() -> None:
    """Wrap `InputProcessor.process_inputs`, once."""
    from vllm.exceptions import VLLMValidationError  # noqa: PLC0415
    from vllm.v1.engine.input_processor import InputProcessor  # noqa: PLC0415

    original = InputProcessor.process_inputs
    if getattr(original, "workbench", False):
        return
    library, base = library_and_base()
    resolve = Resolver(Library(library), base)
    settings = Settings.of_environment()
    beam.refuse()

    @functools.wraps(original)
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kw: Any
    ) -> Any:
        extra = getattr(params, "extra_args", None) or {}
        if kw.get("lora_request") is not None:
            try:
                check_folder(kw["lora_request"])
            except WorkbenchError as error:
                raise VLLMValidationError(str(error), parameter="model") from error
        if STEER not in extra:
            return original(self, request_id, prompt, params, *args, **kw)
        try:
            receipt_id(extra)
            if kw.get("resumable"):
                raise GrammarError(
                    "Steering does not work with inputs that are streamed in; send the whole prompt."
                )
            resolved = resolve(as_text(extra[STEER]), shape_of(self.vllm_config))
            _check_operators(resolved, settings)
            if resolved.condition is not None:
                check_engine(settings)
                if other := {CAPTURE, PROJECT} & set(extra):
                    raise GrammarError(
                        f"A request with a condition cannot '{min(other)}' as well; send two requests."
                    )
        except WorkbenchError as error:
            raise VLLMValidationError(str(error), parameter=STEER) from error
        request = original(self, request_id, prompt, params, *args, **kw)
        # vLLM has copied the parameters, which a caller may share among prompts.
        params = request.sampling_params
        assert params is not None
        params.extra_args = {**extra, STEER: resolved.to_json()}
        if resolved.condition is not None:
            params.skip_reading_prefix_cache = True
        if resolved.injections:
            request.cache_salt = salted(request.cache_salt, resolved.digest)
        return request

    process_inputs.workbench = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = process_inputs


def _check_operators(resolved: Resolved, settings: Settings) -> None:
    if settings.operators:
        return
    others = resolved.operators - {"add"}
    if others:
        raise GrammarError(
            f"This engine was started for the operator 'add' alone, so '{min(others)}' is not "
            "possible; start it with --operators all."
        )


def salted(salt: str | None, digest: str) -> str:
    """The client's own salt and ours, as one that fits vLLM's 128 characters."""
    return hashlib.sha256(f"{salt or ''}\n{digest}".encode()).hexdigest()
