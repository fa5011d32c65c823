"""What all tabs share: the one `Workbench` of this process, and its engine's start.

`gr.State` holds only names and run ids; everything else is read from the service when it is needed,
so that a page that reloads finds it again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from ui.forms import STILL, told
from ui.reload import recall
from ui.streaming import Stops
from vectors.errors import EngineFailed, InputError, WorkbenchError
from workbench.service import EngineStatus, Workbench

__all__ = ["Session"]

log = logging.getLogger("ui")


class Session:
    """The workbench behind the page, and the engine's start in the background."""

    def __init__(self, wb: Workbench, autostart: bool = True) -> None:
        self.wb = wb
        self.autostart = autostart
        self.page: gr.Blocks = gr.Blocks()
        self.base = ""
        self.stops = Stops()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stage = self._error = ""
        self._greeted = False

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
            EngineFailed: its start has not come far enough to be stopped, or a run uses it.
        """
        self._must_not_be_starting()
        self._must_not_be_used()
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
        self._must_not_be_used()
        self.base = self._error = ""
        self.wb.use_model(name.strip())
        if self.autostart:
            self.start_engine()

    def _must_not_be_starting(self) -> None:
        if self.starting:
            raise EngineFailed("The model is still being fetched; wait a moment and try again.")

    def _must_not_be_used(self) -> None:
        """A run that has attached to the engine of this process would fail with it."""
        busy = [view.id for view in self.wb.runs.list() if not view.ended]
        if busy and self.wb.owns_engine:
            raise EngineFailed(
                f"The run {busy[0]} may need the engine that would stop; wait for its end, or cancel "
                "it first."
            )

    # -- events ---------------------------------------------------------------------------------

    def on_show(
        self,
        tab: gr.Tab,
        handler: Callable[..., Any],
        inputs: Sequence[Any],
        box: gr.HTML,
        outputs: Sequence[Any],
    ) -> None:
        """Fill `outputs` by `handler` when the page is loaded and whenever the tab is opened.

        Where the browser kept `inputs`, that is what the handler gets: a tab may be opened while the
        page still loads. `inputs` are taken as they are sent: what was kept is not among the choices
        of a list that is still empty, and Gradio would refuse it.
        """
        filled = told(len(outputs))(handler)
        for event in (tab.select, self.page.load):
            event(
                filled, list(inputs), [box, *outputs], js=recall(inputs), preprocess=False, **STILL
            )
