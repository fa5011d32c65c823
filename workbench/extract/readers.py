"""Where extraction reads a model: in this process, or inside the engine that serves it.

Letters: L blocks, N samples, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from vectors.errors import Cancelled
from workbench.data.templates import Sample, context_ids, instructed
from workbench.engines.base import Cancel, Message, Request, Sampling, never
from workbench.engines.vllm.client import Span, VllmEngine
from workbench.models.capture import Position, block_means
from workbench.models.catalog import Model
from workbench.models.loading import LoadedModel

__all__ = ["Asked", "EngineReader", "ModelReader", "Reader"]

TOKENS = 48
BATCH = 16
SPANS_AT_ONCE = 64

Asked = tuple[str, str]
"""A prompt, and the instruction that the system gives."""
Report = Callable[[float, str], None]


class Reader(Protocol):
    """Reads activations of one model, and answers prompts under instructions with it."""

    @property
    def info(self) -> Model:
        """The model."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        ...

    def means(
        self, samples: Sequence[Sample], position: Position, report: Report
    ) -> tuple[Tensor, Tensor]:
        """Activations `[L, N, D]` at `position`, and mean norms `[L, N]` over completion tokens."""
        ...

    def answers(self, asked: Sequence[Asked], report: Report) -> list[str]:
        """A greedy reply to each prompt."""
        ...


class ModelReader:
    """Runs a model in this process, by hooks on its blocks."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.info, self.tokenizer = loaded.info, loaded.tokenizer

    def means(
        self, samples: Sequence[Sample], position: Position, report: Report
    ) -> tuple[Tensor, Tensor]:
        """See `Reader`."""
        return block_means(self.loaded.model, samples, position, report)

    def answers(self, asked: Sequence[Asked], report: Report) -> list[str]:
        """See `Reader`."""
        found: list[str] = []
        for start in range(0, len(asked), BATCH):
            found += self._answers(asked[start : start + BATCH])
            report(start / len(asked), f"answering under instructions, {start} of {len(asked)}")
        return found

    @torch.inference_mode()
    def _answers(self, asked: Sequence[Asked]) -> list[str]:
        model: Any = self.loaded.model
        contexts = [context_ids(self.tokenizer, _chat(self.tokenizer, one)) for one in asked]
        longest = max(map(len, contexts))
        device = next(model.parameters()).device
        pad = self.tokenizer.pad_token_id
        ids_BT = torch.tensor(
            [[pad] * (longest - len(c)) + list(c) for c in contexts], device=device
        )
        mask_BT = torch.tensor(
            [[0] * (longest - len(c)) + [1] * len(c) for c in contexts], device=device
        )
        out_BT = model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=pad,
        )
        texts = self.tokenizer.batch_decode(out_BT[:, longest:], skip_special_tokens=True)
        return [text.strip() for text in texts]


class EngineReader:
    """Reads inside the engine that serves the model, so that it is not loaded a second time."""

    def __init__(
        self, engine: VllmEngine, info: Model, tokenizer: Any, cancel: Cancel = never
    ) -> None:
        self.engine, self.info, self.tokenizer, self.cancel = engine, info, tokenizer, cancel

    def means(
        self, samples: Sequence[Sample], position: Position, report: Report
    ) -> tuple[Tensor, Tensor]:
        """See `Reader`."""
        spans = [_span(s, position) for s in samples]
        # The norms are those of the completion, wherever the direction is read.
        other = [] if position == "completion-mean" else [_span(s) for s in samples]
        means: list[Tensor] = []
        norms: list[Tensor] = []
        everything = [*spans, *other]
        for start in range(0, len(everything), SPANS_AT_ONCE):
            if self.cancel():
                raise Cancelled("The extraction was cancelled.")
            for captured in self.engine.capture(everything[start : start + SPANS_AT_ONCE]):
                means.append(captured.mean_LD)
                norms.append(captured.norm_L)
            done = min(len(everything), start + SPANS_AT_ONCE)
            report(
                done / len(everything),
                f"reading activations in the engine, {done} of {len(everything)}",
            )
        return torch.stack(means[: len(spans)], 1), torch.stack(norms[-len(samples) :], 1)

    def answers(self, asked: Sequence[Asked], report: Report) -> list[str]:
        """See `Reader`."""
        report(0.0, f"answering under instructions, {len(asked)} prompts")
        greedy = Sampling(TOKENS, temperature=0.0)
        requests = [Request(_chat(self.tokenizer, one), sampling=greedy) for one in asked]
        return [reply.text.strip() for reply in self.engine.generate(requests, self.cancel)]


def _chat(tokenizer: Any, asked: Asked) -> tuple[Message, ...]:
    prompt, instruction = asked
    return instructed(tokenizer, instruction, prompt)


def _span(s: Sample, position: Position = "completion-mean") -> Span:
    ids, start = [*s.context, *s.completion], len(s.context)
    if position == "completion-mean":
        return Span(ids, start, len(ids) - 1)
    at = len(ids) - 1 if position == "last" else start - 1
    return Span(ids, at, at)
