"""What every engine can do, and the values that go in and come out.

Token log-probabilities are natural logarithms (nats).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypedDict

__all__ = [
    "BASE_WEIGHTS",
    "LORA",
    "Cancel",
    "Engine",
    "LoraReceipt",
    "Message",
    "Pair",
    "Projections",
    "Receipt",
    "Reply",
    "Request",
    "Sampling",
    "TokenTable",
    "never",
]

BASE_WEIGHTS = "base"
LORA = "lora:"
"""How a weight state begins that is a LoRA on the base, and so belongs to single requests."""
Cancel = Callable[[], bool]
Pair = tuple[Sequence[int], Sequence[int]]
TokenTable = list[dict[int, float]]
"""For each scored token, the log-probabilities of the likeliest next tokens by id."""


def never() -> bool:
    """Nobody cancels."""
    return False


class Message(TypedDict):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy."""

    max_tokens: int = 128
    temperature: float = 0.7
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Request:
    """One chat to answer: which messages, steered by what (text of the grammar), on which weights.

    `weights` is "base", the digest of a recipe whose weights are swapped in, or `lora:` and the digest
    of a LoRA. `project` names a vector, and a block after a colon, on which each token is projected.
    """

    messages: tuple[Message, ...]
    steer: str = ""
    weights: str = BASE_WEIGHTS
    sampling: Sampling = field(default_factory=Sampling)
    project: str = ""


@dataclass(frozen=True)
class Receipt:
    """Proof of steering: distinct positions steered per phase, and rows used.

    `cached` positions were taken from the prefix cache of equally steered requests. `least` is the
    number of steered positions of the request that has fewest. `declined` requests had a condition that
    their prompts do not meet, and `projection` is what the last one was decided by. `problem` says why
    the engine could not steer a request that it had accepted.
    """

    requests: int = 0
    prompt: int = 0
    decode: int = 0
    cached: int = 0
    rows: int = 0
    least: int = 0
    problem: str = ""
    declined: int = 0
    projection: float | None = None


@dataclass(frozen=True)
class LoraReceipt:
    """Which LoRA answered: the digest of its recipe, its rank, and the share of the change that it
    loses. The engine holds factors for `modules` layers; `left_out` tensors it cannot hold."""

    recipe: str
    rank: int
    error: float
    modules: int
    left_out: int


@dataclass(frozen=True)
class Projections:
    """How far each token of a reply lies along a vector, in units of the mean norm, as doses are.

    The model has read every token but the last, so that there is a value less than tokens where the
    reply was cut off; while it is written, more tokens may wait for theirs.
    """

    vector: str
    tokens: tuple[str, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Reply:
    """What an engine answered."""

    text: str
    tokens: int
    finish: str
    weights: str
    receipt: Receipt | None
    seconds: float
    lora: LoraReceipt | None = None
    projections: Projections | None = None


class Engine(Protocol):
    """Something that generates. All engines pass one contract test."""

    @property
    def base(self) -> str:
        """Digest of the base that it serves."""
        ...

    @property
    def window(self) -> int:
        """Positions that a prompt and its reply have together; what is scored leaves one to a reply."""
        ...

    def stream(self, request: Request, cancel: Cancel = ...) -> Iterator[str | Projections | Reply]:
        """Yield pieces of text, and the whole `Reply` last; where the request wants projections, also
        all `Projections` so far, whenever there are more of them."""
        ...

    def generate(self, requests: Sequence[Request], cancel: Cancel = ...) -> list[Reply]:
        """Answer many chats together."""
        ...

    def score(
        self,
        sequences: Sequence[Pair],
        *,
        steer: str = "",
        weights: str = BASE_WEIGHTS,
        cancel: Cancel = ...,
    ) -> list[float]:
        """Log p(completion | context) in nats for pairs of (context ids, completion ids)."""
        ...

    def tables(
        self,
        sequences: Sequence[Pair],
        *,
        top: int,
        steer: str = "",
        weights: str = BASE_WEIGHTS,
        cancel: Cancel = ...,
    ) -> list[TokenTable]:
        """For each completion token, the `top` likeliest tokens and their log-probabilities."""
        ...

    def describe(self) -> Mapping[str, object]:
        """Name, version, dtype and the like, for provenance."""
        ...
