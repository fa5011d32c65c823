"""Contrast sets as tables, as files, and in words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ui.forms import typed
from ui.markup import note

__all__ = ["about", "counts", "jsonl_of", "pairs_table", "slug"]

MOST_SHOWN = 300


def about(found: Any) -> str:
    """What a set is for, and how its pairs are used."""
    purpose = f"{found.about[:1].upper()}{found.about[1:]}. " if found.about else ""
    kind = "system instructions" if found.by_instruction else "replies"
    train, held_out = len(found.train), len(found.held_out)
    cut = f" The first {MOST_SHOWN} are shown." if len(found.pairs) > MOST_SHOWN else ""
    return note(
        f"{purpose}{len(found.pairs)} pairs of {kind}: {train} to find the direction (train), "
        f"{held_out} kept back to check it (held out).{cut}",
        "plain",
    )


def pairs_table(found: Any) -> list[list[str]]:
    """Rows of a contrast set for a table."""
    held_out = {pair.prompt for pair in found.held_out}
    return [
        [
            pair.prompt,
            pair.positive or pair.positive_instruction,
            pair.negative or pair.negative_instruction,
            "held out" if pair.prompt in held_out else "train",
        ]
        for pair in found.pairs[:MOST_SHOWN]
    ]


def counts(found: Any) -> str:
    """How many pairs a set has."""
    return f"{len(found.pairs)} pairs: {len(found.train)} train, {len(found.held_out)} held out."


def jsonl_of(rows: list[list[Any]], sides: str) -> str:
    """The table's rows as a contrast file; an empty row is an empty line, so that numbers agree."""
    names = ("positive", "negative")
    if sides == "instructions":
        names = ("positive_instruction", "negative_instruction")
    lines = []
    for row in rows:
        prompt, one, other = (typed(cell) for cell in [*row, "", "", ""][:3])
        pair = {"prompt": prompt, names[0]: one, names[1]: other}
        lines.append(json.dumps(pair, ensure_ascii=False) if prompt or one or other else "")
    return "\n".join(lines)


def slug(path: str) -> str:
    """A valid name from a file's name."""
    words = re.sub(r"[^a-z0-9._-]+", "-", Path(path).stem.lower()).strip("-._")
    return words or "my-set"
