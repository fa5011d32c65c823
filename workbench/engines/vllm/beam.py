"""Refuse beam search of requests that are ours: vLLM drops their extra arguments there, and the reply
would not be steered."""

from __future__ import annotations

import functools
from typing import Any

from workbench.engines.vllm.capture.spec import CAPTURE, PROJECT
from workbench.engines.vllm.spec import STEER

__all__ = ["refuse"]


def refuse() -> None:
    """Wrap `to_beam_search_params` of chats and completions; call it once."""
    from vllm.entrypoints.openai.chat_completion import protocol as chat  # noqa: PLC0415
    from vllm.entrypoints.openai.completion import protocol as completion  # noqa: PLC0415
    from vllm.exceptions import VLLMValidationError  # noqa: PLC0415

    for cls in (chat.ChatCompletionRequest, completion.CompletionRequest):
        original: Any = cls.to_beam_search_params

        @functools.wraps(original)
        def refused(self: Any, *args: Any, original: Any = original, **kw: Any) -> Any:
            if {STEER, CAPTURE, PROJECT} & set(self.vllm_xargs or {}):
                raise VLLMValidationError(
                    "Steering and capture do not work with beam search; leave 'use_beam_search' out.",
                    parameter=STEER,
                )
            return original(self, *args, **kw)

        cls.to_beam_search_params = refused
