"""Whose turn it is where only one weight state can be at a time.

Requests of the present state run together; one of another state waits until those have drained, then the
weights are swapped, and it goes on. Whoever waits for a swap holds newcomers of the old state back, so
nobody starves.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from workbench.engines.base import BASE_WEIGHTS

__all__ = ["Turns"]

UNKNOWN = ""
"""The state that no request names: while weights are swapped, and after a swap that failed half-way."""


@dataclass
class Turns:
    """Who runs, who waits, and on which weights."""

    swap: Callable[[str], Awaitable[None]]
    present: str = BASE_WEIGHTS
    running: int = 0
    waiting: deque[tuple[str, asyncio.Future[None]]] = field(default_factory=deque)
    swapping: asyncio.Task[None] | None = None

    async def enter(self, wanted: str) -> None:
        """Return once the engine holds `wanted`; pair with `leave`."""
        if self.enter_now(wanted):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append((wanted, turn))
        self._advance()
        try:
            await turn
        except asyncio.CancelledError:
            self.waiting = deque(x for x in self.waiting if x[1] is not turn)
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.leave()
            else:
                self._advance()
            raise

    def enter_now(self, wanted: str) -> bool:
        """Enter if that takes no waiting."""
        if wanted != self.present or self.waiting or self.swapping:
            return False
        self.running += 1
        return True

    def leave(self) -> None:
        """A request that had entered is done."""
        self.running -= 1
        self._advance()

    async def enter_unless(self, leaves: Callable[[], Awaitable[Any]], wanted: str) -> bool:
        """As `enter`; False for a request that `leaves` before its turn, which has nothing to pair."""
        if self.enter_now(wanted):
            return True
        turn = asyncio.ensure_future(self.enter(wanted))
        left = asyncio.ensure_future(leaves())
        entered = False
        try:
            await asyncio.wait((turn, left), return_when=asyncio.FIRST_COMPLETED)
            if turn.done():
                await turn
                entered = True
            return entered
        finally:
            turn.cancel()
            left.cancel()
            came, _ = await asyncio.gather(turn, left, return_exceptions=True)
            if came is None and not entered:
                self.leave()

    def _advance(self) -> None:
        if self.swapping or not self.waiting:
            return
        wanted, first = self.waiting[0]
        if wanted != self.present:
            if not self.running:
                # A task of its own, because whoever asks may leave while others wait for its end.
                self.swapping = asyncio.create_task(self._change(wanted, first))
            return
        together = [x for x in self.waiting if x[0] == self.present]
        self.waiting = deque(x for x in self.waiting if x[0] != self.present)
        for _, turn in together:
            if not turn.done():
                self.running += 1
                turn.set_result(None)
        self._advance()

    async def _change(self, wanted: str, first: asyncio.Future[None]) -> None:
        self.present = UNKNOWN
        try:
            await self.swap(wanted)
            self.present = wanted
        except Exception as error:
            self.waiting = deque(x for x in self.waiting if x[1] is not first)
            if not first.done():
                first.set_exception(error)
        finally:
            self.swapping = None
        self._advance()
