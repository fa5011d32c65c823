"""Several replies at once, streamed side by side."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vectors.errors import Cancelled, WorkbenchError
from workbench.service import Workbench

__all__ = ["Part", "together"]

log = logging.getLogger("ui")
PACE = 0.1
"""Seconds between two pictures of the replies: fast enough to read, slow enough for the browser."""


@dataclass
class Part:
    """One reply so far; `reply` is the engine's whole answer, once there is one."""

    text: str = ""
    reply: Any = None
    error: str = ""
    done: bool = False


def _feed(wb: Workbench, name: str, request: Any, stop: threading.Event, into: queue.Queue) -> None:
    try:
        for piece in wb.stream(request, stop.is_set):
            into.put((name, piece))
    except Cancelled:
        pass
    except WorkbenchError as error:
        into.put((name, error))
    except Exception as error:
        log.exception("a stream failed")
        into.put((name, RuntimeError(f"The engine's reply broke off ({type(error).__name__}).")))
    finally:
        into.put((name, None))


def together(
    wb: Workbench, requests: Mapping[str, Any], stop: threading.Event
) -> Iterator[dict[str, Part]]:
    """Yield all replies as they grow, until each is done; ends early once `stop` is set."""
    parts = {name: Part() for name in requests}
    pieces: queue.Queue[tuple[str, Any]] = queue.Queue()
    for name, request in requests.items():
        arguments = (wb, name, request, stop, pieces)
        threading.Thread(target=_feed, args=arguments, daemon=True).start()
    try:
        while not all(part.done for part in parts.values()):
            changed = _take(pieces, parts)
            if changed or not any(part.text for part in parts.values()):
                yield parts
            if stop.is_set():
                break
        yield parts
    finally:
        stop.set()


def _take(pieces: queue.Queue[tuple[str, Any]], parts: dict[str, Part]) -> bool:
    """Take what has come within one pace; tell whether anything has."""
    changed = False
    time.sleep(PACE)
    while True:
        try:
            name, piece = pieces.get_nowait()
        except queue.Empty:
            return changed
        changed = True
        part = parts[name]
        if piece is None:
            part.done = True
        elif isinstance(piece, str):
            part.text += piece
        elif isinstance(piece, Exception):
            part.error = str(piece)
        else:
            part.reply, part.text = piece, piece.text or part.text
