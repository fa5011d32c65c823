"""How weights were merged, noted beside them; it is no part of what they are."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from vectors.formats.atomic import write_atomic
from vectors.formats.canonical import canonical_json

__all__ = ["Made", "made_on", "note"]

FILE = "workbench-made.json"


@dataclass(frozen=True)
class Made:
    """How weights were merged.

    Args:
        device: "cpu", or the card's name.
        why: why it was the processor; "" where it was not.
        held: what stayed on the card between the passes: "all", "base" or "none"; "" elsewhere.
        crossed: bytes that went to the card.
        seconds: from the first byte read to the last one written.
    """

    device: str
    why: str = ""
    held: str = ""
    crossed: int = 0
    seconds: float = 0.0


def note(folder: Path, made: Made) -> None:
    """Note beside the weights in `folder` how they were made."""
    write_atomic(folder / FILE, canonical_json(asdict(made)))


def made_on(folder: Path) -> str:
    """Return the device on which the weights in `folder` were merged; "" where nobody noted it."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((folder / FILE).read_bytes())["device"])
    return ""
