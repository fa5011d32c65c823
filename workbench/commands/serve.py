"""`workbench serve`: the engine in the foreground, for other clients."""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from vectors.errors import EngineFailed, InputError
from workbench.commands.shared import Session, command
from workbench.commands.show import facts
from workbench.engines.vllm.gpu import SHARE
from workbench.engines.vllm.settings import (
    CAPTURE,
    LORA_RANK,
    LORA_SLOTS,
    MOST_SLOTS,
    OPERATORS,
    ROWS,
)
from workbench.engines.vllm.versions import ALLOW_UNTESTED
from workbench.settings import WINDOW

__all__ = ["add_to"]

Port = Annotated[int | None, typer.Option(help="Default: a free one.", min=1, max=65_535)]
Operators = Literal["all", "add"]


def add_to(app: typer.Typer) -> None:
    """Add the command to the root."""
    command(app, "serve")(serve)


def serve(
    session: Session,
    port: Port = None,
    selftest: Annotated[
        bool, typer.Option("--selftest", help="Print what the self-test at load has checked.")
    ] = False,
    allow_untested: Annotated[
        bool,
        typer.Option("--allow-untested", help="Use any vLLM, as long as the self-test passes."),
    ] = False,
    rows: Annotated[
        int | None,
        typer.Option(help="Most different steerings at once.", min=2, max=100_000),
    ] = None,
    operators: Annotated[
        Operators | None,
        typer.Option(help="Compile every operator in, or additions alone, which cost less."),
    ] = None,
    capture: Annotated[
        bool | None,
        typer.Option(help="Let requests read activations; on a GPU every step pays for it."),
    ] = None,
    gpu_share: Annotated[
        float | None,
        typer.Option(
            help="Of a GPU's memory; by default half, or what the model needs.", min=0.05, max=1
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(help="Positions of prompt and reply; by default at most 4096.", min=256),
    ] = None,
    lora_slots: Annotated[
        int | None,
        typer.Option(
            help="LoRAs that may run in one batch; none by default.", min=0, max=MOST_SLOTS
        ),
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="The highest rank of a LoRA; by default 64.", min=1)
    ] = None,
) -> None:
    """Run vLLM with the plugin until Ctrl-C; other commands and clients use it meanwhile."""
    if session.engine_kind != "vllm":
        raise InputError("'serve' starts vLLM; leave --engine out.")
    wb = session.wb
    session.model()
    chosen = {
        ALLOW_UNTESTED: "1" if allow_untested else None,
        ROWS: None if rows is None else str(rows),
        OPERATORS: operators,
        CAPTURE: None if capture is None else str(int(capture)),
        SHARE: gpu_share,
        WINDOW: window,
        LORA_SLOTS: lora_slots,
        LORA_RANK: lora_rank,
    }
    os.environ.update({name: str(value) for name, value in chosen.items() if value is not None})
    # A service manager ends us with SIGTERM; the engine is then stopped as on Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    wb.start_engine(port)
    engine = session.engine()
    if not wb.owns_engine:
        _check_running(engine.describe(), window, lora_slots, lora_rank, rows, operators, capture)
    where = wb.access()
    tested: Any = engine.describe() if selftest else {}
    session.answer(
        {**where, **({"selftest": tested["selftest"]} if selftest else {})},
        lambda out: _draw(out, where, tested, wb.owns_engine),
    )
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


def _check_running(
    has: Mapping[str, Any],
    window: int | None,
    slots: int | None,
    rank: int | None,
    rows: int | None,
    operators: Operators | None,
    capture: bool | None,
) -> None:
    """An engine that runs already keeps what it was started with."""
    lacking = {
        f"--window {window}": has.get("window", 0) < (window or 0),
        f"--lora-rank {rank}": has.get("lora", {}).get("rank", 0) < (rank or 0),
        f"--lora-slots {slots}": has.get("lora", {}).get("slots", 0) < (slots or 0),
        f"--rows {rows}": has.get("rows", 0) < (rows or 0),
        "--operators all": operators == "all" and not has.get("projecting"),
        "--capture": bool(capture) and not has.get("capture"),
    }
    if asked := [option for option, lacks in lacking.items() if lacks]:
        raise InputError(
            f"An engine of this home runs already, without {' and '.join(asked)}; stop it first, or "
            "leave that out."
        )


def _draw(out: Console, where: dict[str, str], tested: dict[str, Any], owned: bool) -> None:
    url, model = where["url"], where["model"]
    out.print(facts({"url": url, "token": where["token"], "model": model}))
    named = [f"WORKBENCH_{name.upper()}={shlex.quote(value)}" for name, value in where.items()]
    out.print(f"\nexport {' '.join(named)}", soft_wrap=True, highlight=False, markup=False)
    if tested:
        found = tested["selftest"]
        worst = found["path_errors"]
        out.print()
        out.print(
            facts(
                {
                    "self-test": f"passed at {found['blocks']} blocks",
                    "residual stream": f"the added vector was found, error {found['stream_error']:.1e}",
                    **{f"path '{name}'": f"error {error:.1e}" for name, error in worst.items()},
                    "runner": f"{tested['runner']}, vLLM {tested['vllm']}, {tested['dtype']}",
                    "rows": f"{tested['rows']}, {tested['projecting']} of them for every operator",
                }
            )
        )
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
