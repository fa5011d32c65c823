"""What is learnt of each kind of data: a chat file, stripped instructions, one side of a set.

    workbench bench data-modes [--json] [--prompts 96] [--passes 1] [--modes chat,instructions,side]

Each mode trains the model in use, but for the passes with the defaults, into a task vector, in a home of
its own that is deleted afterwards, and measures decisions that were never learnt: the mean
log-probability of a token for the base, for the base with the instructions in its context, and for the
trained model without them. Distillation from a vector is what `workbench demo` measures.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _home import own_workbench
from _results import RESULTS, publish

from workbench.service import Workbench

INSTRUCTIONS = (
    "Answer as the captain of an old sailing ship: speak of the sea, the wind and your crew, "
    "and call whoever asks 'shipmate'."
)


def main() -> None:
    """Train in each mode, print, and append to the results file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--prompts", type=int, default=96, help="prompts that the model answers")
    parser.add_argument("--passes", type=int, default=1, help="passes over the decisions")
    parser.add_argument("--modes", default="chat,instructions,side", help="which, by commas")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to append to")
    asked = parser.parse_args()
    if wrong := set(asked.modes.split(",")) - set(MODES):
        parser.error(f"--modes knows {', '.join(MODES)}, not {', '.join(sorted(wrong))}")
    with tempfile.TemporaryDirectory() as folder, own_workbench() as workbench:
        numbers = {}
        for mode in asked.modes.split(","):
            numbers[mode] = measured(workbench, mode, Path(folder), asked)
            # The next mode may fail after minutes; what is known by then is not lost.
            print(json.dumps({mode: numbers[mode]}), file=sys.stderr, flush=True)
    publish("data-modes", numbers, as_json=asked.json, results=asked.results)


def measured(
    workbench: Workbench, mode: str, folder: Path, asked: argparse.Namespace
) -> dict[str, Any]:
    """Train in one mode; what it found, in seconds, nats a token, and nats of margin."""
    started = time.monotonic()
    data = MODES[mode](workbench, folder)
    found = workbench.learn(name=mode, prompts=asked.prompts, passes=asked.passes, **data)
    seconds = round(time.monotonic() - started)
    kept = (
        "log_prob",
        "recovered",
        "margin",
        "kl",
        "decisions",
        "replay",
        "steps",
        "tier",
        "times",
    )
    return {"seconds": seconds, **{name: found[name] for name in kept if name in found}}


def chat_file(workbench: Workbench, folder: Path) -> dict[str, Any]:
    """The positive side of `cheerful` as a person would bring it: one conversation a line."""
    path = folder / "chats.jsonl"
    rows = [
        [{"role": "user", "content": p.prompt}, {"role": "assistant", "content": p.positive}]
        for p in workbench.contrast.get("cheerful").pairs
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), "utf-8")
    return {"data": str(path)}


def instructions(workbench: Workbench, folder: Path) -> dict[str, Any]:
    """One instruction for every general prompt, stripped before training."""
    path = folder / "instructions.txt"
    path.write_text(INSTRUCTIONS, "utf-8")
    return {"instructions": str(path)}


def side(workbench: Workbench, folder: Path) -> dict[str, Any]:
    """The positive side of `formal`, of which the held-out pairs' margin is measured, too."""
    return {"contrast": "formal", "side": "positive"}


MODES: dict[str, Callable[[Workbench, Path], dict[str, Any]]] = {
    "chat": chat_file,
    "instructions": instructions,
    "side": side,
}


if __name__ == "__main__":
    main()
