"""The engine for machines where vLLM cannot be installed: plain transformers, one batch at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from vectors.errors import Cancelled, InputError, NameNotFound, PromptTooLong, SteeringNotApplied
from vectors.steering.operators import Edit, apply_edit, combine, edit_of
from vectors.store import Library
from vectors.types import Phase
from workbench.data.templates import context_ids
from workbench.engines.base import (
    BASE_WEIGHTS,
    Cancel,
    Pair,
    Receipt,
    Reply,
    Request,
    TokenTable,
    never,
)
from workbench.engines.vllm.spec import Injection, Resolved, parse_request, resolve_request
from workbench.models.blocks import decoder_blocks
from workbench.models.catalog import Model, describe
from workbench.models.loading import load_model
from workbench.settings import Home, package_version

__all__ = ["TransformersEngine"]


class TransformersEngine:
    """Holds one weight state at a time and answers one request after the other."""

    def __init__(self, info: Model, library: Library, home: Home) -> None:
        self.info = info
        self.library = library
        self.home = home
        self._lock = Lock()
        self._weights = BASE_WEIGHTS
        self._loaded = load_model(info)

    @property
    def base(self) -> str:
        """Digest of the base."""
        return self.info.base

    @property
    def window(self) -> int:
        """As many positions as vLLM would be started with."""
        return self.info.served_window

    def describe(self) -> Mapping[str, object]:
        """Name and version."""
        dtype = str(next(self._loaded.model.parameters()).dtype).removeprefix("torch.")
        return {
            "engine": "transformers",
            "transformers": package_version("transformers"),
            "dtype": dtype,
        }

    def stream(self, request: Request, cancel: Cancel = never) -> Iterator[str | Reply]:
        """Yield pieces of text, and the whole reply last."""
        started = time.monotonic()
        with self._lock:
            self._use(request.weights)
            tokenizer: Any = self._loaded.tokenizer
            context = context_ids(tokenizer, request.messages)
            if len(context) + request.sampling.max_tokens > self.info.window:
                raise PromptTooLong(
                    f"The prompt has {len(context)} tokens and {request.sampling.max_tokens} more are "
                    f"asked for; the model's window holds {self.info.window}."
                )
            steering = _Steering(self, request.steer)
            ids: list[int] = []
            shown, finish = "", "length"
            for token in self._tokens(context, request, steering):
                if token in self._stops():
                    finish = "stop"
                    break
                ids.append(token)
                text = tokenizer.decode(ids, skip_special_tokens=True)
                # A character may need several tokens; hold it back until it is whole.
                if not text.endswith("\ufffd") and len(text) > len(shown):
                    yield text[len(shown) :]
                    shown = text
                if cancel():
                    finish = "cancelled"
                    break
            proof = steering.receipt()
            seconds = time.monotonic() - started
            text = tokenizer.decode(ids, skip_special_tokens=True)
            yield Reply(text, len(ids), finish, self._weights, proof, seconds)

    def generate(self, requests: Sequence[Request], cancel: Cancel = never) -> list[Reply]:
        """Answer many chats, one after the other."""
        replies: list[Reply] = []
        for request in requests:
            replies += [x for x in self.stream(request, cancel) if isinstance(x, Reply)]
        return replies

    def score(
        self,
        sequences: Sequence[Pair],
        *,
        steer: str = "",
        weights: str = BASE_WEIGHTS,
        cancel: Cancel = never,
    ) -> list[float]:
        """Log p(completion | context) in nats."""
        rows = self._rows(sequences, steer, weights, cancel)
        return [
            float(logp_TV.gather(1, torch.tensor([*completion])[:, None]).sum())
            for logp_TV, (_, completion) in zip(rows, sequences, strict=True)
        ]

    def tables(
        self,
        sequences: Sequence[Pair],
        *,
        top: int,
        steer: str = "",
        weights: str = BASE_WEIGHTS,
        cancel: Cancel = never,
    ) -> list[TokenTable]:
        """For each completion token, the `top` likeliest tokens and their log-probabilities."""
        found = []
        for logp_TV in self._rows(sequences, steer, weights, cancel):
            best = logp_TV.topk(min(top, logp_TV.shape[-1]), dim=-1)
            found.append(
                [
                    dict(zip(ids.tolist(), values.tolist(), strict=True))
                    for ids, values in zip(best.indices, best.values, strict=True)
                ]
            )
        return found

    # -- underneath -----------------------------------------------------------------------------

    @torch.inference_mode()
    def _rows(
        self, sequences: Sequence[Pair], steer: str, weights: str, cancel: Cancel
    ) -> Iterator[Tensor]:
        with self._lock:
            self._use(weights)
            for context, completion in sequences:
                if cancel():
                    raise Cancelled("The scoring was cancelled.")
                ids_BT = torch.tensor([[*context, *completion]], device=self._device)
                steering = _Steering(self, steer)
                with steering.on(len(context) + len(completion)):
                    steering.at(0)
                    logits_TV = self._loaded.model(
                        input_ids=ids_BT, use_cache=False, logits_to_keep=len(completion) + 1
                    ).logits[0, :-1]
                yield logits_TV.float().log_softmax(-1).cpu()

    @torch.inference_mode()
    def _tokens(
        self, context: Sequence[int], request: Request, steering: _Steering
    ) -> Iterator[int]:
        sampling = request.sampling
        generator = torch.Generator().manual_seed(
            torch.seed() if sampling.seed is None else sampling.seed
        )
        cache = DynamicCache(config=self._loaded.model.config)
        ids_BT = torch.tensor([list(context)], device=self._device)
        at = 0
        for _ in range(sampling.max_tokens):
            with steering.on(len(context)):
                steering.at(at)
                logits_V = self._loaded.model(
                    input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1
                ).logits[0, -1]
            at += ids_BT.shape[1]
            token = _choose(logits_V.float().cpu(), sampling.temperature, sampling.top_p, generator)
            yield token
            ids_BT = torch.tensor([[token]], device=self._device)

    @property
    def _device(self) -> torch.device:
        return next(self._loaded.model.parameters()).device

    def _stops(self) -> set[int]:
        config = self._loaded.model.generation_config
        stops = config.eos_token_id
        return {
            self._loaded.tokenizer.eos_token_id,
            *(stops if isinstance(stops, list) else [stops]),
        }

    def _use(self, weights: str) -> None:
        if weights == self._weights:
            return
        folder = self.info.folder if weights == BASE_WEIGHTS else self.home.weights / weights
        if not (folder / "config.json").is_file():
            raise NameNotFound(f"The weights {weights[:12]} are not on this disk; make them first.")
        state = load_model(self.info if weights == BASE_WEIGHTS else describe(weights, folder))
        self._loaded, self._weights = state, weights


class _Steering:
    """The additions of one request, with a count of the positions that they touched."""

    def __init__(self, engine: TransformersEngine, steer: str) -> None:
        self._blocks = decoder_blocks(engine._loaded.model)
        self._asked = bool(steer) and any(term.acts for term in parse_request(steer))
        self._text = steer
        self._resolved = (
            resolve_request(steer, engine.library, engine.base) if steer else Resolved(())
        )
        if self._resolved.condition is not None:
            raise InputError("The engine transformers decides no condition; use --engine vllm.")
        self._vectors = {
            i.vector: engine.library.vector_by_digest(i.vector) for i in self._resolved.injections
        }
        self._seen: dict[Phase, set[int]] = {Phase.PROMPT: set(), Phase.DECODE: set()}
        self._start = 0
        self._prompt = 0

    def at(self, start: int) -> None:
        """The position of the first token that runs next."""
        self._start = start

    @contextmanager
    def on(self, prompt: int) -> Iterator[None]:
        """Steer while inside; the first `prompt` positions are the prompt."""
        self._prompt = prompt
        with ExitStack() as hooks:
            for block in {i.block for i in self._resolved.injections}:
                hooks.callback(self._blocks[block].register_forward_hook(self._hook(block)).remove)
            yield

    def _hook(self, block: int) -> Any:
        def add(module: Any, inputs: Any, output: Any) -> Any:
            h_BTD = output if isinstance(output, Tensor) else output[0]
            positions_T = torch.arange(self._start, self._start + h_BTD.shape[1])
            in_prompt_T = positions_T < self._prompt
            late_T = positions_T >= self._resolved.start
            steered_BTD = h_BTD
            for phase, now_T in ((Phase.PROMPT, in_prompt_T), (Phase.DECODE, ~in_prompt_T)):
                mask_T = now_T & late_T
                here = [i for i in self._resolved.at(phase) if i.block == block]
                if not here or not bool(mask_T.any()):
                    continue
                edit = combine(self._edit(i) for i in here)
                edited_BTD = apply_edit(h_BTD.flatten(0, 1).float(), edit).view_as(h_BTD)
                mask_T1 = mask_T[:, None].to(h_BTD.device)
                steered_BTD = torch.where(mask_T1, edited_BTD.to(h_BTD.dtype), steered_BTD)
                self._seen[phase].update(positions_T[mask_T].tolist())
            if isinstance(output, Tensor):
                return steered_BTD
            return (steered_BTD, *output[1:])

        return add

    def _edit(self, injection: Injection) -> Edit:
        vector, block = self._vectors[injection.vector], injection.block
        direction_D, norm = vector.directions[block], vector.mean_norms[block]
        return edit_of(injection.operator, direction_D, norm, injection.dose)

    def receipt(self) -> Receipt | None:
        """The proof, or None where nothing was asked for."""
        if not self._text:
            return None
        prompt, decode = len(self._seen[Phase.PROMPT]), len(self._seen[Phase.DECODE])
        if self._asked and not prompt + decode:
            raise SteeringNotApplied(
                f"'{self._text}' was asked for and touched no position of the reply; with phase "
                "decode, ask for at least 2 tokens."
            )
        rows = len({i.block for i in self._resolved.injections})
        return Receipt(1, prompt, decode, 0, rows, prompt + decode)


def _choose(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    p_V = (logits_V / temperature).softmax(-1)
    if top_p < 1:
        ordered_V, index_V = p_V.sort(descending=True)
        ordered_V[ordered_V.cumsum(0) - ordered_V > top_p] = 0
        p_V = torch.zeros_like(p_V).scatter(0, index_V, ordered_V)
    return int(torch.multinomial(p_V, 1, generator=generator))
