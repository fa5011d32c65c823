"""`workbench serve`: the engine in the foreground, for other clients."""

from __future__ import annotations

import signal
import time
from typing import Annotated

import typer
from rich.console import Console

from vectors.errors import EngineFailed, InputError
from workbench.commands.shared import Session, command
from workbench.commands.show import facts

__all__ = ["add_to"]

Port = Annotated[int | None, typer.Option(help="Default: a free one.", min=1, max=65_535)]


def add_to(app: typer.Typer) -> None:
    """Add the command to the root."""
    command(app, "serve")(serve)


def serve(session: Session, port: Port = None) -> None:
    """Run vLLM with the plugin until Ctrl-C; other commands and clients use it meanwhile."""
    if session.engine_kind != "vllm":
        raise InputError("'serve' starts vLLM; leave --engine out.")
    wb = session.wb
    session.model()
    # A service manager ends us with SIGTERM; the engine is then stopped as on Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    wb.start_engine(port)
    session.engine()
    where = wb.access()
    session.answer(where, lambda out: _draw(out, where, wb.owns_engine))
    if not wb.owns_engine:
        return
    try:
        while (status := wb.engine_status()).state == "ready":
            time.sleep(0.5)
    except KeyboardInterrupt:
        wb.stop_engine()
        session.note("Stopped.")
        return
    raise EngineFailed(status.error or "The engine has stopped; start it again.")


def _draw(out: Console, where: dict[str, str], owned: bool) -> None:
    url, model = where["url"], where["model"]
    out.print(facts({"url": f"{url}/v1", "token": where["token"], "model": model}))
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    lines = [
        f"curl {url}/v1/chat/completions",
        f"-H 'Authorization: Bearer {where['token']}'",
        "-H 'Content-Type: application/json'",
        f"-d '{body}'",
    ]
    out.print()
    out.print(" \\\n  ".join(lines), soft_wrap=True)
    out.print()
    out.print("Ctrl-C stops it." if owned else "Another process of this home runs it already.")
