"""Coroutines in tests."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

__all__ = ["run"]


def run(walk: Coroutine[Any, Any, Any], seconds: float = 30) -> Any:
    """Run to the end, on a thread of its own: Playwright's loop goes on in this one for the session."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, asyncio.wait_for(walk, seconds)).result()
