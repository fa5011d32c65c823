"""The worker's part of conditional steering: whether the prompt of a request asks for it.

The prompt's positions are captured at the condition's block. Before the first step behind the prompt
the sums are read, which waits for the step that computed them, once for each conditional request.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from vectors.errors import BackendUnavailable
from workbench.engines.vllm.capture.captures import Captures
from workbench.engines.vllm.spec import Condition

__all__ = ["Conditions", "Decision"]

DECISIONS_KEPT = 20_000


@dataclass(frozen=True)
class Decision:
    """The projection that was found, and whether the condition holds for it."""

    projection: float
    steered: bool


@dataclass(frozen=True)
class _Pending:
    condition: Condition
    direction_D: Tensor
    length: int


class Conditions:
    """What is still open, and what was decided: once for each request, whatever befalls it later."""

    def __init__(self, captures: Captures | None) -> None:
        self._captures = captures
        self._pending: dict[str, _Pending] = {}
        self._decided: OrderedDict[str, Decision] = OrderedDict()

    @property
    def pending(self) -> bool:
        """Whether any request waits for its decision."""
        return bool(self._pending)

    def decision(self, request: str) -> Decision | None:
        """What was decided for a request, if it was."""
        return self._decided.get(request)

    def add(
        self,
        request: str,
        condition: Condition,
        direction_D: Tensor,
        *,
        length: int,
        computed: int,
        slot: int,
    ) -> None:
        """Watch the prompt of a request that is not decided yet.

        Raises:
            BackendUnavailable: an engine that does not capture, or a prompt out of a cache.
        """
        if self._captures is None:
            raise BackendUnavailable(
                "This engine was started without capture, which a condition needs; start it with "
                "'workbench serve --capture'."
            )
        if computed:
            raise BackendUnavailable(
                f"{computed} positions of the prompt came from a cache, where no condition can be "
                "read; send the request through vLLM's own server or LLM class."
            )
        self._captures.watch(request, condition.block, length, slot)
        self._pending[request] = _Pending(condition, direction_D, length)

    def remove(self, request: str) -> None:
        """A request has ended or was preempted; what was decided stays."""
        if self._pending.pop(request, None) is not None and self._captures is not None:
            self._captures.unwatch(request)

    def decide(self, ends: dict[str, int]) -> dict[str, Decision]:
        """Decide the pending requests whose prompts have run; `ends` says how far each has come."""
        found: dict[str, Decision] = {}
        assert self._captures is not None or not self._pending
        for request, p in list(self._pending.items()):
            if ends.get(request, 0) < p.length:
                continue
            assert self._captures is not None
            projection = self._captures.project(request, p.direction_D)
            self.remove(request)
            found[request] = Decision(projection, p.condition.holds(projection))
        self._decided.update(found)
        while len(self._decided) > DECISIONS_KEPT:
            self._decided.popitem(last=False)
        return found
