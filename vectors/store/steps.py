"""The steps of a write, so that tests can stop a process between any two of them.

Each change of the disk is followed by one `step`. In ordinary use nobody watches, and a step costs
one comparison. The fault tests watch, and kill the process or fail the disk at the n-th step, for
every n that the work has.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["step", "watch"]

_watcher: Callable[[str], None] | None = None


def step(what: str) -> None:
    """Say that a step is done."""
    if _watcher is not None:
        _watcher(what)


def watch(watcher: Callable[[str], None] | None) -> None:
    """Call `watcher` after each step of this process; None stops it."""
    global _watcher
    _watcher = watcher
