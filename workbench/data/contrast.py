"""Contrast sets: prompts with a positive and a negative side, read, checked, split and kept.

One JSON object a line, UTF-8. A line has either completions or instructions:

    {"prompt": "...", "positive": "...", "negative": "...", "tags": ["weather"]}
    {"prompt": "...", "positive_instruction": "...", "negative_instruction": "...", "tags": []}

Completions are two replies to the prompt. Instructions are two system prompts; the model's own
replies under each become the completions when a vector is extracted. All lines of a set are of one
kind.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vectors.errors import ContrastSetError, NameNotFound, NameTaken, OutOfSpace
from vectors.grammar import NAME, check_name
from workbench.settings import Home

__all__ = [
    "HELD_OUT",
    "ContrastPair",
    "ContrastSet",
    "ContrastSets",
    "parse_contrast",
    "read_contrast",
]

HELD_OUT = 0.25
FEWEST = 8
MOST_BYTES = 20 * 2**20
Builtin = Literal["cheerful", "formal", "brief", "accepts-direction"]
ABOUT = {
    "cheerful": "cheerful against gloomy replies",
    "formal": "formal against casual replies",
    "brief": "short answers against long-winded ones",
    "accepts-direction": "carries out a direction against offering alternatives",
}


class ContrastPair(BaseModel):
    """One prompt and its two sides."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)
    prompt: str = Field(min_length=1, max_length=20_000)
    positive: str = Field(default="", max_length=20_000)
    negative: str = Field(default="", max_length=20_000)
    positive_instruction: str = Field(default="", max_length=20_000)
    negative_instruction: str = Field(default="", max_length=20_000)
    tags: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _two_sides(self) -> ContrastPair:
        completions = bool(self.positive), bool(self.negative)
        instructions = bool(self.positive_instruction), bool(self.negative_instruction)
        if any(completions) and any(instructions):
            raise ValueError("has completions and instructions; give one kind")
        if not all(completions) and not all(instructions):
            raise ValueError("needs both 'positive' and 'negative' (or both instructions)")
        if completions[0] and self.positive == self.negative:
            raise ValueError("has the same text on both sides")
        if instructions[0] and self.positive_instruction == self.negative_instruction:
            raise ValueError("has the same instruction on both sides")
        return self

    @property
    def by_instruction(self) -> bool:
        """Whether the sides are system instructions."""
        return bool(self.positive_instruction)

    @property
    def held_out(self) -> bool:
        """Whether the pair is kept from extraction; by its prompt alone, so it is stable."""
        return int(self.key[:8], 16) / 2**32 < HELD_OUT

    @cached_property
    def key(self) -> str:
        """sha256 of the prompt, blind to case and spacing; pairs with one key stay together."""
        return hashlib.sha256(" ".join(self.prompt.lower().split()).encode()).hexdigest()


@dataclass(frozen=True)
class ContrastSet:
    """A checked set with its fixed split.

    Args:
        lines: the line of each pair in the file that the set was read from.
    """

    name: str
    pairs: tuple[ContrastPair, ...]
    about: str = ""
    builtin: bool = False
    lines: tuple[int, ...] = ()

    @cached_property
    def train(self) -> tuple[ContrastPair, ...]:
        """The pairs that a direction is read from."""
        return self._split[0]

    @cached_property
    def held_out(self) -> tuple[ContrastPair, ...]:
        """The pairs that everything is measured on."""
        return self._split[1]

    @cached_property
    def _split(self) -> tuple[tuple[ContrastPair, ...], tuple[ContrastPair, ...]]:
        held = [p for p in self.pairs if p.held_out]
        rest = [p for p in self.pairs if not p.held_out]
        # A small set can hash to one side; move whole prompts, in hash order, until both hold two.
        order = sorted({p.key for p in self.pairs})
        for key in order:
            if len({p.key for p in held}) >= 2:
                break
            held += [p for p in rest if p.key == key]
            rest = [p for p in rest if p.key != key]
        for key in reversed(order):
            if len({p.key for p in rest}) >= 2:
                break
            rest += [p for p in held if p.key == key]
            held = [p for p in held if p.key != key]
        return tuple(rest), tuple(held)

    @property
    def by_instruction(self) -> bool:
        """Whether the sides are system instructions."""
        return self.pairs[0].by_instruction

    def line(self, pair: ContrastPair) -> int:
        """The line of a pair of this set, or its place where it was not read from a file."""
        return self._lines[pair]

    @cached_property
    def _lines(self) -> dict[ContrastPair, int]:
        lines = self.lines or range(1, len(self.pairs) + 1)
        return dict(zip(self.pairs, lines, strict=True))

    @cached_property
    def digest(self) -> str:
        """sha256 of the canonical text."""
        return hashlib.sha256(self.to_jsonl().encode()).hexdigest()

    def to_jsonl(self) -> str:
        """The canonical text of the set."""
        rows = (p.model_dump(exclude_defaults=True) for p in self.pairs)
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def parse_contrast(
    name: str, raw: bytes | str, *, about: str = "", builtin: bool = False
) -> ContrastSet:
    """Read a set from the bytes of a JSONL file.

    Raises:
        ContrastSetError: not UTF-8, too large, empty, too few, one-sided, duplicated or mixed
            lines; the message names up to five lines.
    """
    pairs, lines, problems = [], [], []
    # Not splitlines: it would cut a text at U+2028 and the like, which JSON allows inside one.
    for number, line in enumerate(_text(name, raw).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            pairs.append(ContrastPair.model_validate_json(line))
            lines.append(number)
        except ValidationError as error:
            problems.append(f"line {number} {_why(error)}")
    if problems:
        more = f"; and {len(problems) - 5} more lines" if len(problems) > 5 else ""
        raise ContrastSetError(f"The set '{name}' cannot be used: {'; '.join(problems[:5])}{more}.")
    check_whole(name, pairs)
    return ContrastSet(name, tuple(pairs), about, builtin, tuple(lines))


def read_contrast(path: Path) -> ContrastSet:
    """Read a set from a JSONL file.

    Raises:
        ContrastSetError: it cannot be read or used.
    """
    try:
        with open(path, "rb") as file:
            # One byte past the limit is enough to refuse what is larger.
            raw = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ContrastSetError(f"The file '{path}' cannot be read: {error.strerror}.") from error
    return parse_contrast(path.stem, raw)


def _text(name: str, raw: bytes | str) -> str:
    if len(raw) > MOST_BYTES:
        raise ContrastSetError(f"The set '{name}' is over {MOST_BYTES >> 20} MB; use a part of it.")
    if isinstance(raw, str):
        raw = raw.encode("utf-8", "surrogatepass")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ContrastSetError(
            f"The set '{name}' is not UTF-8 text (line {line}); save it as UTF-8 and try again."
        ) from error


def _why(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    words = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("json_invalid", "model_type"):
        return "is not a JSON object"
    if first["type"] == "extra_forbidden":
        return f"has an unknown field '{where[:40]}'"
    return f"{words}" if not where else f"'{where}': {words[0].lower()}{words[1:]}"


def check_whole(name: str, pairs: Sequence[ContrastPair]) -> None:
    """Refuse pairs that together are no set.

    Raises:
        ContrastSetError: too few, of too few prompts, of two kinds, or repeated.
    """
    if not pairs:
        raise ContrastSetError(f"The set '{name}' is empty; write one JSON object a line.")
    prompts = len({p.key for p in pairs})
    if len(pairs) < FEWEST or prompts < 4:
        raise ContrastSetError(
            f"The set '{name}' has {len(pairs)} pairs over {prompts} prompts; at least {FEWEST} "
            "pairs over 4 prompts are needed to split and measure, and 48 or more are better."
        )
    if len({p.by_instruction for p in pairs}) > 1:
        raise ContrastSetError(
            f"The set '{name}' mixes completions and instructions; put them in two sets."
        )
    counts = Counter(p.model_dump_json(exclude={"tags"}) for p in pairs)
    doubled = sum(n - 1 for n in counts.values())
    if doubled > len(pairs) // 10:
        raise ContrastSetError(
            f"The set '{name}' repeats {doubled} of its {len(pairs)} pairs; remove the duplicates, "
            "which would make it look surer than it is."
        )


class ContrastSets:
    """The built-in sets and the user's own, by name."""

    def __init__(self, home: Home) -> None:
        self.folder = home.library / "contrast"

    def names(self) -> list[str]:
        """Built-in names first, then the user's own."""
        own = sorted(f.stem for f in self.folder.glob("*.jsonl")) if self.folder.is_dir() else []
        return [*get_args(Builtin), *own]

    def get(self, named: str) -> ContrastSet:
        """A set by name, or by the path of a JSONL file.

        Raises:
            NameNotFound: neither a set nor a file.
            ContrastSetError: it cannot be used.
        """
        if named in get_args(Builtin):
            raw = files("workbench.data").joinpath(f"builtin/{named}.jsonl").read_bytes()
            return parse_contrast(named, raw, about=ABOUT[named], builtin=True)
        own = self.folder / f"{named}.jsonl"
        try:
            if re.fullmatch(NAME, named) and own.is_file():
                return read_contrast(own)
            path = Path(named).expanduser()
            if path.is_file():
                return read_contrast(path)
        except (OSError, ValueError, RuntimeError) as error:
            raise ContrastSetError(f"The file {named[:80]!r} cannot be read: {error}.") from error
        raise NameNotFound(
            f"There is no contrast set {named[:80]!r}; use {', '.join(self.names())}, "
            "or a JSONL file."
        )

    def save(self, name: str, raw: bytes | str, *, replace: bool = False) -> ContrastSet:
        """Check a set and keep it under `name`.

        Raises:
            NameTaken: a built-in name, or one in use unless `replace`.
            ContrastSetError: it cannot be used; nothing is kept.
        """
        check_name(name, "set name")
        path = self.folder / f"{name}.jsonl"
        if name in get_args(Builtin) or (path.exists() and not replace):
            raise NameTaken(f"A contrast set called '{name}' exists; choose another name.")
        checked = parse_contrast(name, raw)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(checked.to_jsonl(), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise OutOfSpace(f"The set '{name}' could not be kept ({error.strerror}).") from error
        return checked

    def delete(self, name: str) -> None:
        """Forget a set of the user's own.

        Raises:
            NameNotFound: no own set of this name; built-in ones stay.
        """
        path = self.folder / f"{name}.jsonl"
        if name not in self.names() or not path.is_file():
            raise NameNotFound(f"You have no contrast set called {name[:60]!r} to delete.")
        path.unlink()
