"""A thread that ends this process when its supervisor is gone, however it went."""

from __future__ import annotations

import os
import threading
import time

import psutil

__all__ = ["SUPERVISOR", "die_with_supervisor", "is_alive", "mark"]

SUPERVISOR = "WORKBENCH_SUPERVISOR"
_started = threading.Event()


def mark(pid: int | None = None) -> str:
    """A process as text; the start time keeps a reused pid from being taken for it."""
    process = psutil.Process(pid)
    return f"{process.pid}:{process.create_time():.2f}"


def is_alive(marked: str) -> bool:
    """Whether the process that `mark` named still runs."""
    try:
        pid, _ = marked.split(":")
        process = psutil.Process(int(pid))
        return mark(int(pid)) == marked and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError):
        return False


def die_with_supervisor(every: float = 0.5) -> None:
    """Watch the process named by `WORKBENCH_SUPERVISOR`, and end this one with it."""
    marked = os.environ.get(SUPERVISOR, "")
    if not marked or _started.is_set():
        return
    _started.set()

    def watch() -> None:
        while is_alive(marked):
            time.sleep(every)
        os._exit(70)

    threading.Thread(target=watch, name="workbench-watchdog", daemon=True).start()
