"""Several replies at once, streamed side by side, and the switch that stops them."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vectors.errors import Cancelled, WorkbenchError
from workbench.service import Projections, Workbench

__all__ = ["Part", "Stop", "Stops", "together"]

log = logging.getLogger("ui")
PACE = 0.1
"""Seconds between two pictures of the replies: fast enough to read, slow enough for the browser."""
PATIENCE = 1.0
"""The same while nothing has come yet; an engine that starts needs the cores more than the browser."""


class Stop(threading.Event):
    """The switch that ends a stream; `forget` says that what came is not wanted either."""

    forget = False


class Stops:
    """The switches of what each browser tab streams now; a tab may stream in several places."""

    def __init__(self) -> None:
        self._stops: dict[tuple[str, str], Stop] = {}

    def new(self, browser: str | None, place: str) -> Stop:
        """A new switch for this place; what streams there already is ended and forgotten."""
        self.end(browser, place, forget=True)
        return self._stops.setdefault((browser or "", place), Stop())

    def end(self, browser: str | None, place: str, forget: bool = False) -> None:
        """End what streams at this place."""
        stop = self._stops.pop((browser or "", place), None)
        if stop is not None:
            stop.forget = forget
            stop.set()

    def end_all(self, browser: str | None) -> None:
        """End everything that streams to this browser tab."""
        for key in [key for key in self._stops if key[0] == (browser or "")]:
            self.end(*key, forget=True)


@dataclass
class Part:
    """One reply so far; `reply` is the engine's whole answer, once there is one, and `projections` are
    those of its tokens that are known."""

    text: str = ""
    reply: Any = None
    projections: Any = None
    error: str = ""
    done: bool = False
    stopped: bool = False


def together(wb: Workbench, requests: Mapping[str, Any], stop: Stop) -> Iterator[dict[str, Part]]:
    """Yield all replies as they grow, until each is done; ends early once `stop` is set."""
    parts = {name: Part() for name in requests}
    pieces: queue.Queue[tuple[str, Any]] = queue.Queue()
    for name, request in requests.items():
        arguments = (wb, name, request, stop, pieces)
        threading.Thread(target=_feed, args=arguments, daemon=True).start()
    shown = 0.0
    try:
        while not all(part.done for part in parts.values()):
            changed = _take(pieces, parts)
            if stop.is_set():
                break
            if changed or time.monotonic() - shown > PATIENCE:
                shown = time.monotonic()
                yield parts
    except GeneratorExit:
        stop.set()
        raise
    for part in parts.values():
        part.stopped = part.reply is None and not part.error
    if not stop.forget:
        yield parts


def _feed(wb: Workbench, name: str, request: Any, stop: Stop, into: queue.Queue) -> None:
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
        elif isinstance(piece, Projections):
            part.projections = piece
        else:
            part.reply, part.text = piece, piece.text or part.text
            part.projections = piece.projections
