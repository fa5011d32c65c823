"""`workbench generate`: answers, steered and on trained weights, or the code that asks for them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import zip_longest
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vectors.errors import InputError
from workbench.commands.heat import HeatWriter
from workbench.commands.shared import Session, command
from workbench.commands.show import span

if TYPE_CHECKING:
    from workbench.engines.base import Reply, Request

__all__ = ["add_to"]

Ways = Literal["swap", "lora"]


def add_to(app: typer.Typer) -> None:
    """Add the command to the root."""
    command(app, "generate")(generate)


def generate(
    session: Session,
    prompt: Annotated[
        list[str], typer.Argument(help="What to answer, each in turn; - reads stdin.")
    ],
    steer: Annotated[
        str, typer.Option(help="Steering terms, such as cheerful=0.2,formal=-0.1.")
    ] = "",
    with_: Annotated[
        str, typer.Option("--with", help="Task vectors, such as cheerful-baked=0.5.")
    ] = "",
    as_: Annotated[
        Ways,
        typer.Option(
            "--as", help="Swap the weights of --with in, or use their low-rank part per request."
        ),
    ] = "swap",
    rank: Annotated[int | None, typer.Option(help="Of --as lora; 16 if nothing is said.")] = None,
    error: Annotated[
        float | None, typer.Option(help="Of --as lora, the most that it may lose, such as 0.1.")
    ] = None,
    project: Annotated[
        str,
        typer.Option(
            help="A vector: show how far each token lies along it, on a terminal in colour."
        ),
    ] = "",
    system: Annotated[str, typer.Option(help="The system prompt.")] = "",
    temperature: Annotated[float, typer.Option(help="0 is greedy; at most 2.")] = 0.7,
    seed: Annotated[int | None, typer.Option(help="Sample the same way again.")] = None,
    max_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 128,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Print the text as it comes.")
    ] = True,
    curl: Annotated[
        bool, typer.Option("--curl", help="Print the request as curl instead.")
    ] = False,
    python: Annotated[
        bool, typer.Option("--python", help="Print the request as Python instead.")
    ] = False,
) -> None:
    """Answer prompts, steered by --steer, on the weights of --with.

    A steering term is name\\[@revision]=dose\\[:block|:first-last]\\[/phase]

    A task term is name\\[@revision]=weight; terms are joined by commas.
    """
    wb = session.wb
    if not with_ and as_ == "lora":
        raise InputError("--as lora says how --with is used; name task vectors with --with.")
    prompts = [_stdin() if text == "-" else text for text in prompt]
    if session.local or steer or with_ or curl or python:
        session.model()
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    sampling |= {"as_": as_, "rank": rank, "error": error, "project": project}
    requests = [
        wb.request(text, steer=steer, tasks=with_, system=system, **sampling)  # type: ignore[arg-type]
        for text in prompts
    ]
    warnings = wb.check_steer(steer) if steer else []
    for words in warnings:
        session.warn(words)
    if curl or python:
        _code(session, requests, curl, python)
        return
    session.engine()
    if session.json or not stream:
        replies = wb.engine().generate(requests)
    else:
        replies = [_streamed(session, request) for request in requests]
    if session.json:
        rows = [{"prompt": p, **asdict(r)} for p, r in zip(prompts, replies, strict=True)]
        session.answer({"replies": rows, "warnings": warnings}, lambda out: None)
    elif not stream:
        for reply in replies:
            sys.stdout.write(reply.text + "\n")
            sys.stdout.flush()
            session.note(_proof(reply))
            _coloured(session, reply)
    if wb.owns_engine:
        session.note(
            "'workbench serve' in another terminal keeps an engine warm for the next answer."
        )


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            "The standard input is not UTF-8 text; convert it and try again."
        ) from error


def _streamed(session: Session, request: Request) -> Reply:
    """Print the text as it comes, coloured where a terminal can, and what proves it afterwards."""
    from workbench.engines.base import Projections  # noqa: PLC0415  # help is light

    whole: Any = None
    shown = bool(request.project) and HeatWriter.works_on(session.out)
    heat = HeatWriter(session.out) if shown else None
    try:
        for piece in session.wb.stream(request):
            if isinstance(piece, Projections):
                if heat is not None:
                    heat.colour(piece)
            elif not isinstance(piece, str):
                whole = piece
            elif heat is not None:
                heat.add(piece)
            else:
                sys.stdout.write(piece)
                sys.stdout.flush()
    finally:
        if heat is not None:
            heat.end()
        sys.stdout.write("\n")
        sys.stdout.flush()
    session.note(_proof(whole))
    _coloured(session, whole)
    return whole


def _coloured(session: Session, reply: Reply) -> None:
    """The tokens once more, each with how far it lies along the vector."""
    found = reply.projections
    if found is None:
        return
    pairs = zip_longest(found.tokens, found.values)
    told = [
        f"{token!r} {value:+.2f}" if value is not None else f"{token!r} -" for token, value in pairs
    ]
    session.note(f"along {found.vector}: " + "  ".join(told))


def _proof(reply: Reply) -> str:
    """The receipt and the weights of a reply, in one line."""
    words = [f"{reply.tokens} tokens in {span(reply.seconds)}"]
    if reply.lora is None:
        words.append(f"weights {reply.weights[:12]}")
    else:
        given = reply.lora
        words.append(f"LoRA of recipe {given.recipe[:12]}, rank {given.rank}")
        words.append(f"{given.error:.1%} of the change lost")
    if reply.receipt is None:
        words.append("not steered")
    else:
        got = reply.receipt
        cached = f" ({got.cached} from the cache)" if got.cached else ""
        words.append(f"steered {got.prompt} prompt{cached} and {got.decode} decode positions")
        if got.projection is not None:
            met = "not met" if got.declined else "met"
            words.append(f"condition {met}: the prompt's projection is {got.projection:+.3f}")
    if reply.finish == "length":
        words.append("cut at --max-tokens")
    return ", ".join(words)


def _code(session: Session, requests: Sequence[Request], curl: bool, python: bool) -> None:
    made = [session.wb.as_code(request) for request in requests]
    wanted = [name for name, asked in (("curl", curl), ("python", python)) if asked]

    def draw(out: object) -> None:
        # Past the console: its wrapping would break what is to be pasted.
        sys.stdout.write(
            "\n".join(code[name].rstrip("\n") for code in made for name in wanted) + "\n"
        )

    session.answer({"code": [{name: code[name] for name in wanted} for code in made]}, draw)
