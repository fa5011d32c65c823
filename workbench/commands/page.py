"""`workbench app`: the page, as a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import webbrowser
from typing import Annotated

import typer

from vectors.errors import BackendUnavailable
from workbench.commands.shared import Session, command

__all__ = ["add_to"]

PR_SET_PDEATHSIG = 1
BROWSER_LIMIT = 120.0


def add_to(app: typer.Typer) -> None:
    """Add the command to the root."""
    command(app, "app")(page)


def page(
    session: Session,
    port: Annotated[int, typer.Option(help="Of the page.", min=1, max=65_535)] = 7860,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")
    ] = True,
) -> None:
    """Open the page, http://127.0.0.1:7860, until Ctrl-C."""
    from filelock import FileLock, Timeout  # noqa: PLC0415  # help is light

    from workbench.settings import Home  # noqa: PLC0415

    if importlib.util.find_spec("gradio") is None:
        raise BackendUnavailable("The page needs Gradio, which is not installed; run 'make setup'.")
    home = Home.at(session.home) if session.home else Home.default()
    url = f"http://127.0.0.1:{port}"
    lock = FileLock(home.engines / f"page-{port}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BackendUnavailable(
            f"The page of this home is open already at {url}; use that one, or another --port."
        ) from None
    with lock:
        if _answers(port):
            raise BackendUnavailable(
                f"Port {port} is in use by another program; name another --port."
            )
        command_line = [sys.executable, "-m", "ui", "--model", session.model_name]
        command_line += ["--port", str(port), "--home", str(home.root)]
        code = _run([*command_line, "--engine", session.engine_kind], url if browser else "")
    if code:
        raise typer.Exit(code)


def _run(command_line: list[str], open_url: str) -> int:
    """Run the page, hand signals on to it, and return its exit code."""
    child = subprocess.Popen(
        command_line, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_parent
    )

    def hand_on(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(number)

    before = {n: signal.signal(n, hand_on) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        if open_url:
            port = int(open_url.rpartition(":")[2])
            threading.Thread(target=_open, args=(open_url, port, child), daemon=True).start()
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0 if code in (-signal.SIGINT, -signal.SIGTERM) else abs(code)


def _die_with_parent() -> None:
    # kill -9 of the command leaves no page behind. Linux only; elsewhere the page outlives it.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _open(url: str, port: int, child: subprocess.Popen[bytes]) -> None:
    """Open the page once it answers; never a text browser in this terminal."""
    if sys.platform == "linux" and not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    ):
        return
    limit = time.monotonic() + BROWSER_LIMIT
    while time.monotonic() < limit and child.poll() is None:
        if _answers(port):
            webbrowser.open(url)
            return
        time.sleep(0.3)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
