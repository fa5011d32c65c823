"""The workbench's side of a vLLM server with our plugin: requests out, replies and receipts in."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from vectors.errors import (
    Cancelled,
    EngineFailed,
    InputError,
    PromptTooLong,
    SteeringNotApplied,
)
from workbench.engines.base import (
    BASE_WEIGHTS,
    LORA,
    Cancel,
    LoraReceipt,
    Pair,
    Projections,
    Receipt,
    Reply,
    Request,
    TokenTable,
    never,
)
from workbench.engines.vllm import lora
from workbench.engines.vllm.capture.found import (
    Captured,
    ProjectedStream,
    Span,
    read_captures,
    read_projections,
)
from workbench.engines.vllm.capture.spec import CAPTURE, CAPTURE_ID, PROJECT
from workbench.engines.vllm.gate import HEADER
from workbench.engines.vllm.paths import CAPTURES, HELLO, RECEIPTS
from workbench.engines.vllm.spec import STEER, STEER_ID, parse_request

__all__ = ["VllmEngine", "request_body"]

BATCH = 16
PARALLEL = 32
TIMEOUT = httpx.Timeout(600.0, connect=10.0)


def request_body(
    request: Request, model: str, *, stream: bool, receipt: str = ""
) -> dict[str, Any]:
    """The OpenAI-compatible body of a request; the page shows the same as curl."""
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "messages": list(request.messages),
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    extra: dict[str, str] = {}
    if request.steer:
        extra |= {STEER: request.steer, **({STEER_ID: receipt} if receipt else {})}
    if request.project and receipt:
        extra |= {PROJECT: request.project, CAPTURE_ID: receipt}
        body["logprobs"] = True
    if extra:
        body["vllm_xargs"] = extra
    return body


class VllmEngine:
    """Speaks to one server; safe to use from several threads.

    Raises:
        EngineFailed: nothing answers at the address, or it is a vLLM without our plugin.
    """

    def __init__(self, url: str, token: str = "") -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {token}"} if token else {}
        # The server is ours and near; a proxy of the environment must not stand between.
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=TIMEOUT, trust_env=False
        )
        self._hello = self._shake_hands()
        served = self._http.get("/v1/models").json()["data"][0]
        self.model: str = served["id"]
        self._window: int = served["max_model_len"]

    def _shake_hands(self) -> dict[str, Any]:
        try:
            reply = self._http.get(HELLO)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise EngineFailed(f"No engine answers at {self.url} ({error}); start one.") from error
        if reply.status_code == 401:
            raise EngineFailed(f"The engine at {self.url} wants its token; set WORKBENCH_TOKEN.")
        try:
            hello = reply.json()
            hello["workers"][0]["blocks"]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise EngineFailed(
                f"The server at {self.url} has no workbench plugin, so it cannot steer; "
                "start it with 'workbench serve'."
            ) from error
        return hello

    @property
    def base(self) -> str:
        """Digest of the base that the server holds."""
        return self._hello["base"]

    @property
    def window(self) -> int:
        """Positions that the server was started with."""
        return self._window

    def describe(self) -> Mapping[str, object]:
        """Version, dtype, window and runner of the server."""
        return {"engine": "vllm", "window": self.window, **self._hello["workers"][0]}

    def close(self) -> None:
        """Drop the connections; the server goes on."""
        self._http.close()

    # -- chats ----------------------------------------------------------------------------------

    def stream(
        self, request: Request, cancel: Cancel = never
    ) -> Iterator[str | Projections | Reply]:
        """Yield pieces of text, projections as they come, and the whole reply last."""
        started = time.monotonic()
        receipt = secrets.token_hex(12)
        body = request_body(request, self.model, stream=True, receipt=receipt)
        pieces: list[str] = []
        tokens, finish, ended = 0, "", False
        written: list[str] = []
        along = ProjectedStream()
        try:
            with self._http.stream(
                "POST", "/v1/chat/completions", json=body, headers=_weights(request.weights)
            ) as reply:
                if reply.status_code != 200:
                    reply.read()
                    self._explain(request.steer, receipt)
                    raise _refusal(reply)
                weights = reply.headers.get(HEADER, BASE_WEIGHTS)
                given = _lora(reply, request.weights)
                for event in _events(reply):
                    if event == "[DONE]":
                        ended = True
                        break
                    chunk = json.loads(event)
                    if "error" in chunk:
                        self._explain(request.steer, receipt)
                        raise EngineFailed(f"The engine stopped: {chunk['error']['message'][:300]}")
                    _answered_by(chunk, request.weights)
                    tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
                    for choice in chunk.get("choices", []):
                        finish = choice.get("finish_reason") or finish
                        written += _tokens(choice)
                        if piece := choice["delta"].get("content"):
                            pieces.append(piece)
                            yield piece
                    if along.take(chunk):
                        yield along.projections(request.project, written)
                    if cancel():
                        finish, ended = "cancelled", True
                        break
        except httpx.HTTPError as error:
            raise _lost(error, "".join(pieces)) from error
        if not ended:
            raise _lost(None, "".join(pieces))
        proof = self._prove(request.steer, receipt, cancelled=finish == "cancelled")
        text, seconds = "".join(pieces), time.monotonic() - started
        if finish == "cancelled":
            # The engine has dropped what nobody waited for.
            projected = along.projections(request.project, written) if request.project else None
        else:
            projected = self._projections(request.project, receipt, written)
        yield Reply(text, tokens, finish, weights, proof, seconds, given, projected)

    def generate(self, requests: Sequence[Request], cancel: Cancel = never) -> list[Reply]:
        """Answer many chats together; order is kept."""

        def one(request: Request) -> Reply:
            if cancel():
                return Reply("", 0, "cancelled", request.weights, None, 0.0)
            started = time.monotonic()
            receipt = secrets.token_hex(12)
            body = request_body(request, self.model, stream=False, receipt=receipt)
            path = "/v1/chat/completions"
            answer, weights, given = self._post(path, body, request.weights, receipt)
            choice = answer["choices"][0]
            proof = self._prove(request.steer, receipt)
            seconds = time.monotonic() - started
            text = choice["message"]["content"] or ""
            used = answer["usage"]["completion_tokens"]
            finish = choice["finish_reason"] or ""
            projected = self._projections(request.project, receipt, _tokens(choice))
            return Reply(text, used, finish, weights, proof, seconds, given, projected)

        with ThreadPoolExecutor(PARALLEL) as pool:
            return list(pool.map(one, requests))

    # -- scoring --------------------------------------------------------------------------------

    def score(
        self,
        sequences: Sequence[Pair],
        *,
        steer: str = "",
        weights: str = BASE_WEIGHTS,
        cancel: Cancel = never,
    ) -> list[float]:
        """Log p(completion | context) in nats for pairs of (context ids, completion ids)."""
        found = self._prompt_logprobs(sequences, 0, steer, weights, cancel)
        return [
            sum(row[token] for row, token in zip(rows, completion, strict=True))
            for rows, (_, completion) in zip(found, sequences, strict=True)
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
        return self._prompt_logprobs(sequences, top, steer, weights, cancel)

    def _prompt_logprobs(
        self, sequences: Sequence[Pair], top: int, steer: str, weights: str, cancel: Cancel
    ) -> list[TokenTable]:
        batches = [sequences[i : i + BATCH] for i in range(0, len(sequences), BATCH)]

        def one(batch: Sequence[Pair]) -> list[TokenTable]:
            if cancel():
                raise Cancelled("The scoring was cancelled.")
            receipt = secrets.token_hex(12)
            body: dict[str, Any] = {
                "model": self.model,
                "prompt": [[*context, *completion] for context, completion in batch],
                "max_tokens": 1,
                "temperature": 0,
                "prompt_logprobs": top,
            }
            if steer:
                body["vllm_xargs"] = {STEER: steer, STEER_ID: receipt}
            answer, *_ = self._post("/v1/completions", body, weights, receipt)
            self._prove(steer, receipt)
            rows = sorted(answer["choices"], key=lambda choice: choice["index"])
            return [
                [_table(x) for x in row["prompt_logprobs"][len(context) :]]
                for row, (context, _) in zip(rows, batch, strict=True)
            ]

        with ThreadPoolExecutor(2) as pool:
            return [table for tables in pool.map(one, batches) for table in tables]

    # -- activations ----------------------------------------------------------------------------

    def capture(self, spans: Sequence[Span], *, weights: str = BASE_WEIGHTS) -> list[Captured]:
        """Read the residual stream behind every block, averaged over each span's positions.

        Raises:
            InputError: a span that its prompt does not have, or an engine started without capture.
        """
        names = [secrets.token_hex(12) for _ in spans]

        def run(name: str, span: Span) -> None:
            body = {
                "model": self.model,
                "prompt": list(span.ids),
                "max_tokens": 1,
                "temperature": 0,
                "vllm_xargs": {CAPTURE: f"{span.first}-{span.last}", CAPTURE_ID: name},
            }
            self._post("/v1/completions", body, weights, "")

        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(run, names, spans))
        return read_captures(self._captured(names), names)

    def _captured(self, names: Sequence[str]) -> bytes:
        try:
            reply = self._http.get(f"{CAPTURES}/{','.join(names)}")
        except httpx.HTTPError as error:
            raise _lost(error, "") from error
        if reply.status_code != 200:
            raise _refusal(reply)
        return reply.content

    def _projections(self, vector: str, name: str, tokens: Sequence[str]) -> Projections | None:
        if not vector:
            return None
        values = read_projections(self._captured([name]), name)
        # A step that was on its way when the reply ended reads a token that nobody sees.
        return Projections(vector, tuple(tokens), tuple(values[: len(tokens)]))

    # -- underneath -----------------------------------------------------------------------------

    def _post(
        self, path: str, body: dict[str, Any], weights: str, receipt: str
    ) -> tuple[dict[str, Any], str, LoraReceipt | None]:
        try:
            reply = self._http.post(path, json=body, headers=_weights(weights))
        except httpx.HTTPError as error:
            raise _lost(error, "") from error
        if reply.status_code != 200:
            self._explain(body.get("vllm_xargs", {}).get(STEER, ""), receipt)
            raise _refusal(reply)
        answer = reply.json()
        _answered_by(answer, weights)
        return answer, reply.headers.get(HEADER, BASE_WEIGHTS), _lora(reply, weights)

    def _explain(self, steer: str, receipt: str) -> None:
        """Tell why a worker ended a request, where its receipt knows; vLLM's own words do not."""
        if not steer:
            return
        with contextlib.suppress(httpx.HTTPError, ValueError):
            problem = self._http.get(f"{RECEIPTS}/{receipt}").json().get("problem")
            if problem:
                raise SteeringNotApplied(f"'{steer}' was not applied: {problem}")

    def _prove(self, steer: str, receipt: str, cancelled: bool = False) -> Receipt | None:
        """Fetch the receipt, and fail where steering was asked for and nothing was steered."""
        if not steer:
            return None
        try:
            reply = self._http.get(f"{RECEIPTS}/{receipt}")
            reply.raise_for_status()
            proof = Receipt(**reply.json())
        except (httpx.HTTPError, ValueError, TypeError) as error:
            raise SteeringNotApplied(
                f"The engine gave no receipt for '{steer}' ({error}); the reply is not trusted."
            ) from error
        if proof.problem:
            raise SteeringNotApplied(f"'{steer}' was not applied: {proof.problem}")
        asked = any(term.acts for term in parse_request(steer))
        declined = 0 < proof.declined == proof.requests
        if asked and proof.least == 0 and not cancelled and not declined:
            raise SteeringNotApplied(
                f"'{steer}' was asked for and touched no position of the reply; with phase decode, "
                "ask for at least 2 tokens."
            )
        return proof


def _tokens(choice: Mapping[str, Any]) -> list[str]:
    return [found["token"] for found in (choice.get("logprobs") or {}).get("content") or []]


def _weights(weights: str) -> dict[str, str]:
    return {HEADER: weights}


def _lora(reply: httpx.Response, weights: str) -> LoraReceipt | None:
    """Which LoRA the engine says that it uses, where one was asked for."""
    if not weights.startswith(LORA):
        return None
    try:
        return LoraReceipt(**json.loads(reply.headers[lora.HEADER]))
    except (KeyError, ValueError, TypeError) as error:
        raise EngineFailed(
            f"The engine does not say which LoRA it uses for {weights[:17]}; the reply is not "
            "trusted. Start it with this version of the workbench."
        ) from error


def _answered_by(answer: Mapping[str, Any], weights: str) -> None:
    """Make sure that vLLM has answered with the LoRA; it names it as the model."""
    if weights.startswith(LORA) and answer.get("model") != weights.removeprefix(LORA):
        raise EngineFailed(
            f"The engine answered with {str(answer.get('model'))[:17]!r} in place of the LoRA "
            f"{weights[:17]}; the reply is not trusted."
        )


def _table(row: Mapping[str, Mapping[str, float]] | None) -> dict[int, float]:
    return {int(token): float(entry["logprob"]) for token, entry in (row or {}).items()}


def _events(reply: httpx.Response) -> Iterator[str]:
    for line in reply.iter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


def _refusal(reply: httpx.Response) -> Exception:
    try:
        error = reply.json()
        words = str(error.get("error", {}).get("message") or error.get("detail") or error)
    except (ValueError, AttributeError):
        words = reply.text[:300]
    if reply.status_code in (400, 404, 422):
        if "maximum model length" in words or "maximum context length" in words:
            return PromptTooLong(f"The prompt does not fit the model's window: {words[:300]}")
        return InputError(words[:600])
    return EngineFailed(f"The engine answered {reply.status_code}: {words[:300]}")


def _lost(error: Exception | None, sofar: str) -> EngineFailed:
    tail = f" after {len(sofar)} characters" if sofar else ""
    why = f" ({type(error).__name__})" if error is not None else ""
    return EngineFailed(
        f"The engine went away{tail}{why}; it will be started again on the next try."
    )
