"""The weight gate's turns, without an engine: order, draining, failure, departure."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from workbench.engines.vllm.gate import Turns


class World:
    """Requests that note when they run, and swaps that check that nobody does."""

    def __init__(self) -> None:
        self.turns = Turns(self.swap)
        self.log: list[str] = []
        self.active = 0
        self.refused: set[str] = set()

    async def swap(self, wanted: str) -> None:
        assert self.active == 0, "weights moved under a running request"
        await asyncio.sleep(0.001)
        if wanted in self.refused:
            raise RuntimeError(f"no {wanted}")
        self.log.append(f"swap {wanted}")

    async def ask(self, wanted: str, seconds: float = 0.002) -> str:
        await self.turns.enter(wanted)
        try:
            self.active += 1
            assert self.turns.present == wanted
            await asyncio.sleep(seconds)
            self.log.append(wanted)
            return self.turns.present
        finally:
            self.active -= 1
            await self.turns.leave()


def run(walk: Coroutine[Any, Any, None]) -> None:
    """Run to the end, on a thread of its own: Playwright's loop goes on in this one for the session."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, asyncio.wait_for(walk, 20)).result()


def test_every_request_runs_on_its_weights_and_none_starves():
    async def walk():
        world = World()
        wanted = [["base", "a", "b"][i % 3] for i in range(60)]
        assert await asyncio.gather(*(world.ask(w) for w in wanted)) == wanted
        assert world.turns.running == 0 and not world.turns.waiting
        # Equal states run together: far fewer swaps than requests.
        assert sum(line.startswith("swap") for line in world.log) <= 6

    run(walk())


def test_newcomers_of_the_old_state_wait_behind_a_swap():
    async def walk():
        world = World()
        first = asyncio.create_task(world.ask("base", 0.05))
        await asyncio.sleep(0.01)
        swapped = asyncio.create_task(world.ask("a"))
        await asyncio.sleep(0.005)
        late = asyncio.create_task(world.ask("base"))
        await asyncio.gather(first, swapped, late)
        assert world.log == ["base", "swap a", "a", "swap base", "base"]

    run(walk())


def test_a_swap_that_fails_is_told_to_its_request_alone():
    async def walk():
        world = World()
        world.refused = {"broken"}
        results = await asyncio.gather(
            world.ask("base"), world.ask("broken"), world.ask("a"), return_exceptions=True
        )
        assert results[0] == "base" and results[2] == "a"
        assert isinstance(results[1], RuntimeError)
        assert await world.ask("base") == "base"

    run(walk())


@pytest.mark.parametrize("leave_after", [0.0, 0.002, 0.012])
def test_a_request_that_leaves_while_waiting_blocks_nobody(leave_after):
    async def walk():
        world = World()
        first = asyncio.create_task(world.ask("base", 0.01))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(world.ask("a", 0.05))
        await asyncio.sleep(leave_after)
        waiting.cancel()
        await asyncio.gather(first, waiting, return_exceptions=True)
        assert await world.ask("b") == "b"
        assert world.turns.running == 0

    run(walk())
