"""`workbench extract`, `verify`, `train`, `compare`, `gradients`, `demo`: long work, each a run."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from vectors.errors import InputError
from workbench.commands.results import draw_result
from workbench.commands.shared import Detach, Session, command

__all__ = ["add_to"]

Vector = Annotated[str, typer.Option("--vector", help="A steering vector of the library.")]
Dose = Annotated[
    float | None, typer.Option(help="Default: the dose that was verified, or the suggested one.")
]
Seed = Annotated[int, typer.Option(help="The same seed and inputs give the same result.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to the root."""
    for work in (extract, verify, train, compare, gradients, demo):
        command(app, work.__name__)(work)


def extract(
    session: Session,
    contrast: Annotated[str, typer.Option(help="A name of 'contrast list', or a JSONL file.")],
    name: Annotated[str, typer.Option(help="The name to keep the vector under.")],
    method: Annotated[
        str, typer.Option(help="mean-difference, pca or logistic.")
    ] = "mean-difference",
    position: Annotated[str, typer.Option(help="completion-mean or last.")] = "completion-mean",
    reader: Annotated[
        str,
        typer.Option(help="model: loaded for this; engine: read in vLLM, which serves it already."),
    ] = "model",
    detach: Detach = False,
) -> None:
    """Extract a steering vector from a contrast set."""
    options = {"contrast": contrast, "name": name, "method": method, "position": position}
    _run(session, "extract", detach, reader=reader, **options)


def verify(
    session: Session,
    vector: Annotated[str, typer.Argument(metavar="NAME", help="A vector of the library.")],
    doses: Annotated[str, typer.Option(help="Doses to measure, such as -0.2,0.1,0.2.")] = "",
    controls: Annotated[
        int, typer.Option(help="Random directions to beat; under 19 the verdict cannot pass.")
    ] = 19,
    seed: Seed = 0,
    detach: Detach = False,
) -> None:
    """Measure whether a direction is right, with controls, and keep the verdict."""
    swept = [_number(dose) for dose in doses.split(",")] if doses.strip() else None
    _run(session, "verify", detach, vector=vector, doses=swept, controls=controls, seed=seed)


def train(
    session: Session,
    name: Annotated[str, typer.Option(help="The name to keep the task vector under.")],
    vector: Vector = "",
    data: Annotated[
        str, typer.Option(help="A chat file (JSONL); marked assistant turns are learnt.")
    ] = "",
    strip_instructions: Annotated[
        str,
        typer.Option(help="A file of instructions: write with them, learn without them."),
    ] = "",
    contrast: Annotated[str, typer.Option(help="A contrast set, of which --prefer learns.")] = "",
    prefer: Annotated[
        str, typer.Option(help="The side of --contrast to learn: positive or negative.")
    ] = "",
    replay_file: Annotated[
        str, typer.Option(help="General text of your own: a chat file, or prompts to answer.")
    ] = "",
    dose: Dose = None,
    optimizer: Annotated[str, typer.Option(help="apollo, adamw or sgd.")] = "apollo",
    targets: Annotated[
        str, typer.Option(help="soft: the teacher's distributions; tokens: its tokens.")
    ] = "soft",
    replay: Annotated[float, typer.Option(help="Share of general text, 0 to 0.9.")] = 0.25,
    learning_rate: Annotated[float, typer.Option(help="5e-5 to 2e-4 works.")] = 1e-4,
    prompts: Annotated[int, typer.Option(help="Prompts that the model answers.")] = 150,
    read_pairs: Annotated[
        bool, typer.Option(help="Learn how the steered model reads the set's own pairs, too.")
    ] = True,
    passes: Annotated[int, typer.Option(help="Times that each decision is used.")] = 1,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 48,
    tier: Annotated[
        str,
        typer.Option(
            help="auto, or: 1 the gradient goes through the context, 2 the context is frozen, "
            "3 as 1 with layers recomputed."
        ),
    ] = "auto",
    reuse: Annotated[
        str, typer.Option(help="Keep contexts that were read: off, device, host or disk.")
    ] = "off",
    refresh_every: Annotated[
        int, typer.Option(help="Steps after which a kept context is read again, to begin with.")
    ] = 16,
    staleness: Annotated[
        float, typer.Option(help="Relative difference to a fresh context that is tolerated.")
    ] = 0.05,
    recorded: Annotated[
        bool,
        typer.Option(help="Pad steps to a few shapes that a GPU records and replays: faster."),
    ] = False,
    recompute: Annotated[
        bool, typer.Option(help="Recompute layers in the backward pass: less memory, slower.")
    ] = False,
    rank: Annotated[int, typer.Option(help="Of APOLLO's view of each gradient.")] = 256,
    batch: Annotated[int, typer.Option(help="Decisions of one step; replay comes on top.")] = 6,
    held_out_every: Annotated[
        int, typer.Option(help="Steps between measurements on held-out decisions.")
    ] = 10,
    checkpoint_every: Annotated[
        int, typer.Option(help="Steps between saves that a killed run goes on from.")
    ] = 20,
    patience: Annotated[
        int, typer.Option(help="Stop after so many held-out measurements without improvement.")
    ] = 0,
    keep: Annotated[
        str, typer.Option(help="Which weights to keep: best on held-out decisions, last, or both.")
    ] = "both",
    seed: Seed = 0,
    detach: Detach = False,
) -> None:
    """Train a vector, a chat file, stripped instructions or one side of a set into the weights."""
    options: dict[str, Any] = {"name": name, "tokens": tokens, "seed": seed, "keep": keep}
    options["tier"] = int(tier) if tier.isdecimal() else tier
    options |= {"reuse": reuse, "recompute": recompute, "patience": patience}
    options |= {"refresh_every": refresh_every, "staleness": staleness, "recorded": recorded}
    options |= {"rank": rank, "batch": batch}
    options |= {"held_out_every": held_out_every, "checkpoint_every": checkpoint_every}
    options |= {"optimizer": optimizer, "targets": targets, "replay": replay, "passes": passes}
    options |= {"learning_rate": learning_rate, "prompts": prompts}
    own = {"data": data, "instructions": strip_instructions, "contrast": contrast}
    own = {key: value for key, value in own.items() if value}
    if prefer and not contrast:
        raise InputError("--prefer chooses a side of --contrast; name the set, or leave it out.")
    if prefer not in ("", "positive", "negative"):
        raise InputError(f"--prefer must be positive or negative, not {prefer[:40]!r}.")
    if bool(vector) + len(own) != 1:
        raise InputError(
            "Name one thing to train in: --vector, --data, --strip-instructions, or --contrast "
            "with --prefer."
        )
    if contrast and not prefer:
        raise InputError("--contrast needs the side to learn; add --prefer positive or negative.")
    if vector:
        if replay_file:
            raise InputError("--replay-file goes with data of your own, not with --vector.")
        _run(session, "train", detach, vector=vector, dose=dose, read_pairs=read_pairs, **options)
        return
    if dose is not None:
        raise InputError("A dose belongs to --vector; leave it out.")
    options |= {**own, "replay_file": replay_file}
    _run(session, "learn", detach, **options, **({"side": prefer} if prefer else {}))


def compare(
    session: Session,
    vector: Vector,
    task: Annotated[str, typer.Option(help="A task vector or recipe of the library.")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; give it again for more. Default: held-out.")
    ] = None,
    dose: Dose = None,
    max_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy; at most 2.")] = 0.0,
    seed: Seed = 0,
    detach: Detach = False,
) -> None:
    """Base, steered and trained, side by side and measured."""
    options = {"vector": vector, "task": task, "prompts": prompt or None, "dose": dose}
    options |= {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    _run(session, "compare", detach, **options)


def gradients(
    session: Session,
    contrast: Annotated[
        str, typer.Option(help="A contrast set, whose positive side is the decisions.")
    ] = "cheerful",
    data: Annotated[str, typer.Option(help="A chat file instead.")] = "",
    decisions: Annotated[int, typer.Option(help="How many of them.")] = 8,
    task: Annotated[
        str, typer.Option(help="A task vector: what its training did to recurrent layers.")
    ] = "",
    detach: Detach = False,
) -> None:
    """Where a decision's gradient comes from and goes, layer by layer, with a report."""
    options = {"contrast": contrast, "data": data, "decisions": decisions, "task": task}
    _run(session, "gradients", detach, **options)


def demo(
    session: Session,
    prompts: Annotated[int, typer.Option(help="Prompts that the steered model answers.")] = 150,
    controls: Annotated[int, typer.Option(help="Random directions to beat.")] = 19,
    seed: Seed = 0,
    detach: Detach = False,
) -> None:
    """The whole loop on the bundled model: extract, steer, verify, train, keep, compare, negate."""
    _run(session, "demo", detach, prompts=prompts, controls=controls, seed=seed)


def _run(session: Session, kind: str, detach: bool, **parameters: Any) -> None:
    result = session.run(kind, detach, **parameters)
    if result is not None:

        def draw(out: Console) -> None:
            draw_result(out, kind, result)

        session.answer(result, draw)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(
            f"{text.strip()[:40]!r} is not a dose; write numbers joined by commas, as in 0.1,0.2."
        ) from error
