"""`python -m ui`: the page on this machine's loopback address, and nowhere else."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vectors.errors import WorkbenchError

if TYPE_CHECKING:
    from workbench.service import Workbench

HOST = "127.0.0.1"
LARGEST_UPLOAD = "25mb"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m ui", description="The page of the workbench.")
    parser.add_argument("--model", help="bundled model, folder, or Hugging Face owner/name")
    parser.add_argument("--port", type=int, default=7860, help="port on 127.0.0.1")
    parser.add_argument("--home", help="folder of all state; default $WORKBENCH_HOME")
    parser.add_argument("--engine", default="vllm", help="vllm, transformers, or a URL")
    parser.add_argument(
        "--no-start",
        action="store_true",
        help="start the engine when it is first needed, not with the page",
    )
    return parser.parse_args(arguments)


def is_free(port: int) -> bool:
    """Whether nothing listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError):
            return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the page until it is ended; return the exit code."""
    options = parse(arguments)
    if not is_free(options.port):
        print(f"Port {options.port} cannot be used; choose another by --port.", file=sys.stderr)
        return 3
    from workbench.service import Workbench  # noqa: PLC0415  # --help answers at once

    named = {"model": options.model} if options.model else {}
    try:
        wb = Workbench(options.home, engine=options.engine, **named)
    except WorkbenchError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    # SIGTERM must end the engine too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with wb, contextlib.suppress(KeyboardInterrupt):
        return _serve(wb, options)
    return 0


def _serve(wb: Workbench, options: argparse.Namespace) -> int:
    # Gradio reads these as it is imported; nothing may be written outside the home.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(wb.home.engines / "cache" / "page")
    os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), HOST]))
    from ui.app import LOOK, make_page  # noqa: PLC0415  # after the environment is set
    from ui.session import Session  # noqa: PLC0415

    page = make_page(Session(wb, autostart=not options.no_start))
    try:
        page.launch(
            server_name=HOST,
            server_port=options.port,
            share=False,
            inbrowser=False,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            footer_links=["api", "settings"],
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,
            max_file_size=LARGEST_UPLOAD,
            **LOOK,
        )
    except OSError as error:
        print(f"The page cannot be served on port {options.port} ({error}).", file=sys.stderr)
        return 3
    print(f"The page is at http://{HOST}:{options.port} (Ctrl-C ends it).", flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
