"""What all tabs share: the one `Workbench` of this process, and how errors become sentences.

`gr.State` holds only names and run ids; everything else is read from the service when it is needed,
so that a page that reloads finds it again.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import gradio as gr

from ui.markup import alert
from vectors.errors import EngineFailed, InputError, NameNotFound, WorkbenchError
from workbench.service import EngineStatus, Workbench

__all__ = [
    "TASKS",
    "VECTORS",
    "Session",
    "as_number",
    "as_numbers",
    "notice",
    "say",
    "told",
    "typed",
]

log = logging.getLogger("ui")
DEFAULT_DOSE = 0.2
VECTORS = ("steering-vector",)
TASKS = ("task-vector", "recipe")


class Session:
    """The workbench behind the page, and the engine's start in the background."""

    def __init__(self, wb: Workbench, autostart: bool = True) -> None:
        self.wb = wb
        self.autostart = autostart
        self.page: gr.Blocks = gr.Blocks()
        self.base = ""
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stage = self._error = ""
        self._greeted = False
        self._stops: dict[str, threading.Event] = {}

    # -- engine ---------------------------------------------------------------------------------

    @property
    def starting(self) -> bool:
        """Whether the model is being fetched or the engine's process begun."""
        return self._thread is not None and self._thread.is_alive()

    def greet(self) -> None:
        """Start the engine with the first page that is loaded; one that was stopped stays so."""
        if self.autostart and not self._greeted:
            self._greeted = True
            self.start_engine()

    def start_engine(self) -> None:
        """Fetch the model if need be and begin to start the engine; returns at once."""
        with self._lock:
            if self.starting:
                return
            self._stage, self._error = "reading the model", ""
            self._thread = threading.Thread(target=self._start, name="engine-start", daemon=True)
            self._thread.start()

    def _start(self) -> None:
        try:
            self.base = self.wb.model(self._report).base[:12]
            self.wb.start_engine()
        except WorkbenchError as error:
            self._error = str(error)
        except Exception as error:
            log.exception("the engine's start failed")
            self._error = f"The engine's start failed ({error}); see the terminal of the page."

    def _report(self, share: float, words: str) -> None:
        self._stage = f"{words}, {share:.0%}" if share else words

    def stop_engine(self) -> None:
        """Stop the engine.

        Raises:
            EngineFailed: its start has not come far enough to be stopped.
        """
        self._must_not_be_starting()
        self._error = ""
        self.wb.stop_engine()

    def engine_status(self) -> EngineStatus:
        """The engine's state, the fetching of the model included; never waits."""
        status = self.wb.engine_status()
        if status.state == "stopped" and self.starting:
            return EngineStatus("starting", self.wb.model_name, stage=self._stage)
        if status.state == "stopped" and self._error:
            return EngineStatus("failed", self.wb.model_name, error=self._error)
        return status

    def use_model(self, name: str) -> None:
        """Change the model, and start its engine if the page starts engines by itself."""
        if not name.strip():
            raise InputError(
                "Name a model: one of the list, a folder, or a Hugging Face owner/name."
            )
        if name.strip() == self.wb.model_name:
            return
        self._must_not_be_starting()
        self.base = self._error = ""
        self.wb.use_model(name.strip())
        if self.autostart:
            self.start_engine()

    def _must_not_be_starting(self) -> None:
        if self.starting:
            raise EngineFailed("The model is still being fetched; wait a moment and try again.")

    # -- library --------------------------------------------------------------------------------

    def entries(self, *kinds: str) -> list[dict[str, Any]]:
        """Rows of these kinds, the newest first, those of this model before others."""
        rows = [row for row in self.wb.library_rows() if row["kind"] in kinds]
        rows.sort(key=lambda row: str(row["created"]), reverse=True)
        return sorted(rows, key=self._foreign)

    def _foreign(self, row: dict[str, Any]) -> bool:
        return bool(self.base) and row["base"] != self.base

    def _label(self, row: dict[str, Any]) -> str:
        words = [row["words"]] if row["words"] else []
        if self._foreign(row):
            words.append("made for another model")
        return f"{row['name']} ({', '.join(words)})" if words else row["name"]

    def dropdown(self, value: str | None, *kinds: str, verified_first: bool = False) -> Any:
        """Refresh a dropdown; what was chosen stays chosen while it exists."""
        rows = self.entries(*kinds)
        if verified_first:
            rows.sort(key=lambda row: (self._foreign(row), row["words"] != "verified"))
        names = [row["name"] for row in rows]
        kept = value if value in names else (names[0] if names else None)
        return gr.update(choices=[(self._label(row), row["name"]) for row in rows], value=kept)

    def default_dose(self, vector: str | None, task: str | None = None) -> float:
        """The dose that a task was trained at, else the verdict's, else the one of extraction."""
        if not vector:
            return DEFAULT_DOSE
        found = (
            self._info(task).get("dose"),
            (self.wb.verdict(vector) or {}).get("working_dose"),
            self._info(vector).get("suggested_dose"),
        )
        return next((float(dose) for dose in found if dose is not None), DEFAULT_DOSE)

    def _info(self, name: str | None) -> Mapping[str, Any]:
        try:
            return self.wb.library.get(name).info if name else {}
        except NameNotFound:
            return {}

    # -- stopping what streams ------------------------------------------------------------------

    def new_stop(self, browser: str | None) -> threading.Event:
        """The switch that ends what this browser tab streams now."""
        key = browser or ""
        self.stop(key)
        self._stops[key] = threading.Event()
        return self._stops[key]

    def stop(self, browser: str | None) -> None:
        """End what this browser tab streams."""
        event = self._stops.pop(browser or "", None)
        if event is not None:
            event.set()


def notice(elem_id: str) -> gr.HTML:
    """An empty box for sentences."""
    return gr.HTML(visible=False, elem_id=elem_id)


def say(markup: str = "") -> Any:
    """Fill a box for sentences, or hide it."""
    return gr.update(value=markup, visible=bool(markup))


def told(count: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turn a handler's errors into sentences.

    The handler's `count` outputs come after one more, the box for sentences. A handler may return a
    `str` of markup for that box itself as an additional first value.
    """

    def wrap(handler: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(handler)
        def run(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
            try:
                out = handler(*args, **kwargs)
            except WorkbenchError as error:
                return (say(alert(str(error))), *[gr.skip()] * count)
            except Exception as error:
                log.exception("a handler of the page failed")
                words = f"The page failed at this ({type(error).__name__}); its terminal says more."
                return (say(alert(words)), *[gr.skip()] * count)
            values = out if isinstance(out, tuple) else (out,) if count else ()
            return values if len(values) == count + 1 else (say(), *values)

        return run

    return wrap


def typed(value: object) -> str:
    """What stands in a text field; a field that was never drawn has no value at all."""
    return "" if value is None else str(value).strip()


def as_number(text: object, what: str) -> float | None:
    """A number that may be left empty.

    Raises:
        InputError: not a number.
    """
    words = typed(text)
    if not words:
        return None
    try:
        return float(words)
    except ValueError as error:
        raise InputError(f"The {what} must be a number, not {words[:40]!r}; try 0.2.") from error


def as_numbers(text: str | None, what: str) -> list[float]:
    """Numbers joined by commas or spaces; none is an empty list.

    Raises:
        InputError: something that is not a number.
    """
    parts: Iterable[str] = typed(text).replace(",", " ").split()
    return [value for part in parts if (value := as_number(part, what)) is not None]
