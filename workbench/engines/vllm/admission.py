"""Hold back a request for which the workers would have no row, until another one has ended.

The scheduler's process counts rows as the workers do (`rows.RowBank`): equal steering shares one, and
a row is in use until the last request with it has ended. So no worker ever runs out of rows.
"""

from __future__ import annotations

import functools
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Any

from vectors.errors import GrammarError
from workbench.engines.vllm.settings import Settings
from workbench.engines.vllm.spec import STEER, Resolved, Row

__all__ = ["Admission", "install"]


class Admission:
    """Counts rows in use: `adding` that only add, and `projecting` that can do every operator."""

    def __init__(self, adding: int, projecting: int) -> None:
        self._limits = {True: adding, False: projecting}
        self._users: Counter[Row] = Counter()
        self._used = {True: 0, False: 0}
        self._rows: dict[str, frozenset[Row]] = {}
        self.held: OrderedDict[str, Any] = OrderedDict()

    def admit(self, request: str, steer: str | None) -> bool:
        """Count the request's rows in, or say that it has to wait."""
        if not steer:
            return True
        try:
            resolved = Resolved.from_json(steer)
        except GrammarError:
            return True  # the worker refuses it, and its receipt says why
        new = {True: 0, False: 0}
        for row in resolved.rows:
            if row not in self._users:
                new[row.adds_only] += 1
        if any(self._used[adds] + n > self._limits[adds] for adds, n in new.items()):
            return False
        for adds, n in new.items():
            self._used[adds] += n
        for row in resolved.rows:
            self._users[row] += 1
        self._rows[request] = resolved.rows
        return True

    def leave(self, request: str) -> None:
        """The request has ended; unknown ones were not steered."""
        for row in self._rows.pop(request, ()):
            self._users[row] -= 1
            if not self._users[row]:
                del self._users[row]
                self._used[row.adds_only] -= 1

    def may_enter(self, request: str, steer: str | None) -> bool:
        """Whether a request goes straight in: it was let in before, or has a row and no queue."""
        if not steer or request in self._rows:
            return True
        return not self.held and self.admit(request, steer)

    def next(self) -> Any:
        """The request that has waited longest, if it may go now; nobody overtakes it."""
        name, request = next(iter(self.held.items()), ("", None))
        if request is None or not self.admit(name, steer_of(request)):
            return None
        return self.held.pop(name)

    def drop(self, requests: Iterable[str] | None) -> list[Any]:
        """Let go of held requests that were cancelled; None means all."""
        names = list(self.held) if requests is None else requests
        return [self.held.pop(name) for name in names if name in self.held]


def steer_of(request: Any) -> str | None:
    """What a request of vLLM's scheduler is steered by."""
    params = request.sampling_params
    return ((params.extra_args if params is not None else None) or {}).get(STEER)


def install() -> None:
    """Wrap the scheduler's methods, once."""
    from vllm.v1.core.sched.scheduler import Scheduler  # noqa: PLC0415

    wrappers = {
        "add_request": _add_request,
        "schedule": _schedule,
        "finish_requests": _finish_requests,
        "_free_request": _free_request,
    }
    for name, around in wrappers.items():
        original = getattr(Scheduler, name)
        if not getattr(original, "workbench", False):
            setattr(Scheduler, name, _wrapped(original, around))


def _wrapped(original: Any, around: Any) -> Any:
    @functools.wraps(original)
    def wrapper(scheduler: Any, *args: Any, **kw: Any) -> Any:
        return around(scheduler, original, *args, **kw)

    wrapper.workbench = True  # type: ignore[attr-defined]
    return wrapper


def _of(scheduler: Any) -> Admission:
    found = getattr(scheduler, "workbench_admission", None)
    if found is None:
        slots = scheduler.scheduler_config.max_num_seqs
        found = Admission(*Settings.of_environment().capacity(slots))
        scheduler.workbench_admission = found
    return found


def _add_request(scheduler: Any, original: Any, request: Any) -> None:
    if _of(scheduler).may_enter(request.request_id, steer_of(request)):
        original(scheduler, request)
    else:
        _of(scheduler).held[request.request_id] = request


def _schedule(scheduler: Any, original: Any, *args: Any, **kw: Any) -> Any:
    while (request := _of(scheduler).next()) is not None:
        scheduler.add_request(request)
    return original(scheduler, *args, **kw)


def _finish_requests(scheduler: Any, original: Any, request_ids: Any, *args: Any, **kw: Any) -> Any:
    if isinstance(request_ids, str):
        request_ids = (request_ids,)
    elif request_ids is not None:
        request_ids = list(request_ids)
    # Whoever waits for the end of a held request hears of it from vLLM, which has to know it first.
    for request in _of(scheduler).drop(request_ids):
        type(scheduler).add_request.__wrapped__(scheduler, request)
    return original(scheduler, request_ids, *args, **kw)


def _free_request(scheduler: Any, original: Any, request: Any, *args: Any, **kw: Any) -> Any:
    _of(scheduler).leave(request.request_id)
    return original(scheduler, request, *args, **kw)
