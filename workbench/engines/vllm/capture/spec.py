"""What a request asks to be captured: text that a client sends, and the same text made definite.

A client sends, in `vllm_xargs`, `capture` and `capture_id` (an id of its own, under which the result is
fetched). The grammar is `positions[:blocks]`:

    40-60          the prompt's positions 40 to 60, both included, counted from 0
    12             one position
    last           the prompt's last position
    decode         the generated positions that the model read
    last:3-5       the same, at blocks 3 to 5 alone

`project` in place of `capture`, `name[@revision][:block]`, asks for the projection of each generated
position on a vector's direction, at its best block where none is named, in units of the mean norm there.

The front end replaces `last` by its number, so that a worker sees definite positions only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vectors.errors import BlockNotFound, GrammarError

__all__ = [
    "CAPTURE",
    "CAPTURE_ID",
    "FOLLOW_ID",
    "PROJECT",
    "Wanted",
    "capture_id",
    "parse_capture",
    "parse_projected",
    "read_projected",
]

CAPTURE = "capture"
CAPTURE_ID = "capture_id"
PROJECT = "project"
FOLLOW_ID = "follow_id"
"""The server's own name for a request for projections; a client's ids may be the same as another's."""
FORM = re.compile(
    r"(?P<word>last|decode)|(?P<first>\d{1,9})(?:-(?P<last>\d{1,9}))?", flags=re.ASCII
)
BLOCKS = re.compile(r"(?P<first>\d{1,9})(?:-(?P<last>\d{1,9}))?", flags=re.ASCII)


@dataclass(frozen=True)
class Wanted:
    """Positions `first` to `last`, or all from the prompt's end on, at blocks `low` to `high`.

    Args:
        first: -1 for the prompt's last position, and for generated ones.
        last: as `first`.
        decode: whether generated positions are wanted.
        low: lowest block.
        high: highest block; None is the model's last.
    """

    first: int
    last: int
    decode: bool = False
    low: int = 0
    high: int | None = None

    def __str__(self) -> str:
        where = "decode" if self.decode else "last" if self.first < 0 else self._span()
        blocks = "" if self.high is None else f":{self.low}-{self.high}"
        return where + blocks

    def _span(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"

    def within(self, length: int) -> Wanted:
        """The same for a prompt of so many positions, `last` with its number.

        Raises:
            GrammarError: positions that the prompt does not have.
        """
        if self.decode:
            return self
        if self.first < 0:
            return replace(self, first=length - 1, last=length - 1)
        if self.last >= length:
            raise GrammarError(
                f"'{CAPTURE}' asks for position {self.last} and the prompt has positions 0 to "
                f"{length - 1}; choose others."
            )
        return self

    def check_blocks(self, blocks: int) -> Wanted:
        """Return this, or raise BlockNotFound where the model has not so many blocks."""
        if self.high is not None and self.high >= blocks:
            raise BlockNotFound(
                f"'{CAPTURE}' asks for block {self.high} and this model has blocks 0 to {blocks - 1}."
            )
        return self


def parse_capture(text: Any) -> Wanted:
    """Read the grammar of this file.

    Raises:
        GrammarError: something else.
    """
    if not isinstance(text, str):
        raise GrammarError(
            f"'{CAPTURE}' must be text such as 40-60, last or decode, not {type(text).__name__}."
        )
    positions, colon, blocks = text.strip().partition(":")
    where, at = FORM.fullmatch(positions), BLOCKS.fullmatch(blocks)
    if where is None or (colon and at is None):
        raise GrammarError(
            f"'{CAPTURE}' is {text[:60]!r}; write positions such as 40-60, last or decode, and after "
            "a colon blocks such as 3 or 3-5."
        )
    low, high = _range(at) if at is not None else (0, None)
    if where["word"]:
        return Wanted(-1, -1, where["word"] == "decode", low, high)
    return Wanted(*_range(where), low=low, high=high)


def _range(found: re.Match[str]) -> tuple[int, int]:
    first = int(found["first"])
    last = first if found["last"] is None else int(found["last"])
    if last < first:
        raise GrammarError(f"'{CAPTURE}' has the range {first}-{last}; write the lower end first.")
    return first, last


def parse_projected(text: Any) -> tuple[str, int | None]:
    """The vector that `project` names, and the block if it names one.

    Raises:
        GrammarError: something else.
    """
    if isinstance(text, str):
        ref, colon, block = text.strip().partition(":")
        if ref and not colon:
            return ref, None
        if ref and block.isascii() and block.isdigit() and len(block) < 6:
            return ref, int(block)
    raise GrammarError(
        f"'{PROJECT}' is {str(text)[:60]!r}; name a vector, such as cheerful or cheerful:12."
    )


def read_projected(text: Any) -> tuple[str, int]:
    """What the front end has made of it: digest and block.

    Raises:
        GrammarError: a text that our front end has not made.
    """
    digest, block = parse_projected(text)
    if block is None:
        raise GrammarError(f"The engine got a '{PROJECT}' that its front end has not resolved.")
    return digest, block


def capture_id(extra_args: Mapping[str, Any]) -> str:
    """The id under which the result will be fetched.

    Raises:
        GrammarError: none, or one that is not short plain text.
    """
    given = extra_args.get(CAPTURE_ID)
    if not isinstance(given, str) or len(given) > 64 or not given.isalnum() or not given.isascii():
        raise GrammarError(
            f"'{CAPTURE}' needs '{CAPTURE_ID}', up to 64 letters and digits, under which the "
            "activations are fetched."
        )
    return given
