"""The front end's part of capturing: refuse what cannot be right, and have every position computed.

Nothing of the prompt may come from the prefix cache, where no layer runs. What the request writes there
is as good as any other's, so its salt stays what it was.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

from vectors.errors import BackendUnavailable, GrammarError, WorkbenchError
from vectors.store import Library
from workbench.engines.vllm.capture.spec import (
    CAPTURE,
    PROJECT,
    Wanted,
    capture_id,
    parse_capture,
    parse_projected,
)
from workbench.engines.vllm.resolver import Resolver, check_shape, shape_of
from workbench.engines.vllm.settings import BASE, Settings, library_and_base
from workbench.engines.vllm.spec import check_vector

__all__ = ["check_engine", "install"]


def install() -> None:
    """Wrap `InputProcessor.process_inputs` around what steering has made of it, once."""
    from vllm.exceptions import VLLMValidationError  # noqa: PLC0415
    from vllm.v1.engine.input_processor import InputProcessor  # noqa: PLC0415

    original = InputProcessor.process_inputs
    if getattr(original, "workbench_captures", False):
        return
    settings = Settings.of_environment()
    library, base = library_and_base()
    resolver = Resolver(Library(library), base)

    @functools.wraps(original)
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kw: Any
    ) -> Any:
        extra = getattr(params, "extra_args", None) or {}
        if PROJECT in extra:
            try:
                resolved = _projected(self, extra, settings, resolver)
                if getattr(params, "n", 1) > 1 or kw.get("resumable"):
                    raise GrammarError(f"'{PROJECT}' reads one reply to a whole prompt; send n=1.")
                if self.vllm_config.speculative_config is not None:
                    raise GrammarError(f"'{PROJECT}' does not work with speculative decoding.")
            except WorkbenchError as error:
                raise VLLMValidationError(str(error), parameter=PROJECT) from error
            request = original(self, request_id, prompt, params, *args, **kw)
            # vLLM has copied the parameters, which a caller may share among prompts.
            params = request.sampling_params
            params.extra_args = {**params.extra_args, PROJECT: resolved}
            return request
        if CAPTURE not in extra:
            return original(self, request_id, prompt, params, *args, **kw)
        try:
            wanted = parse_capture(extra[CAPTURE])
            capture_id(extra)
            check_engine(settings)
            _check_request(self, params, wanted, kw)
            request = original(self, request_id, prompt, params, *args, **kw)
            if not request.prompt_token_ids:
                raise GrammarError(f"'{CAPTURE}' needs a prompt of tokens, not of embeddings.")
            wanted = wanted.within(len(request.prompt_token_ids))
        except WorkbenchError as error:
            raise VLLMValidationError(str(error), parameter=CAPTURE) from error
        # vLLM has copied the parameters, which a caller may share among prompts.
        params = request.sampling_params
        params.extra_args = {**params.extra_args, CAPTURE: str(wanted)}
        params.skip_reading_prefix_cache = True
        return request

    process_inputs.workbench_captures = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = process_inputs


def _projected(
    processor: Any, extra: Mapping[str, Any], settings: Settings, resolver: Resolver
) -> str:
    """Check a request that wants projections; return its vector's digest and the block."""
    ref, block = parse_projected(extra[PROJECT])
    capture_id(extra)
    check_engine(settings)
    if CAPTURE in extra:
        raise GrammarError(f"'{PROJECT}' does not go with '{CAPTURE}'; send two requests.")
    vector = resolver.vector(ref)
    block = vector.best_block if block is None else block
    check_vector(ref, vector, os.environ[BASE], block)
    check_shape(ref, vector, [block], shape_of(processor.vllm_config))
    return f"{vector.digest}:{block}"


def check_engine(settings: Settings) -> None:
    """Refuse to read activations where the engine cannot, or where some might come from its cache.

    Raises:
        GrammarError, BackendUnavailable: with what to do.
    """
    from vllm.sampling_params import SamplingParams  # noqa: PLC0415

    if not settings.capture:
        raise GrammarError(
            "This engine was started without capture; start it with 'workbench serve --capture'."
        )
    if not hasattr(SamplingParams(), "skip_reading_prefix_cache"):
        raise BackendUnavailable(
            "This vLLM cannot leave its prefix cache unread for one request, so that activations "
            "cannot be captured; install a version that the workbench was tested with."
        )


def _check_request(processor: Any, params: Any, wanted: Wanted, more: dict[str, Any]) -> None:
    config = processor.vllm_config
    blocks = getattr(config.model_config.hf_text_config, "num_hidden_layers", None)
    if blocks is not None:
        wanted.check_blocks(blocks)
    if getattr(params, "n", 1) > 1:
        raise GrammarError(f"'{CAPTURE}' reads one reply; send n=1, or several requests.")
    if more.get("resumable"):
        raise GrammarError(
            f"'{CAPTURE}' does not work with inputs that are streamed in; send the whole prompt."
        )
    if not wanted.decode:
        return
    # Positions that ran although the reply had ended before them, or that were guessed wrong, would
    # be in the sums.
    if config.speculative_config is not None:
        raise GrammarError("'decode' cannot be captured with speculative decoding; name positions.")
    asynchronous = bool(config.scheduler_config.async_scheduling)
    ends = params.stop or (asynchronous and (not params.ignore_eos or params.stop_token_ids))
    if ends:
        raise GrammarError(
            "'decode' is captured to the end of 'max_tokens': send no 'stop'"
            + (", and 'ignore_eos': true." if asynchronous else ".")
        )
