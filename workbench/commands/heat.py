"""Tokens on a terminal while they are written, each on the colour of its projection.

The text waits for the values of its tokens, which come some tenths of a second behind it; what is written
in the end is the whole reply, whatever its tokens are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

    from workbench.engines.base import Projections

__all__ = ["HeatWriter"]

AWAY, TOWARDS = (37, 99, 235), (234, 88, 12)
FAINTEST, STRONGEST = 0.05, 0.9
LEAST = 0.05
"""The smallest full scale, as on the page."""
NEAR = 16
"""Within how many characters a token is looked for; one without characters of its own is passed over."""


class HeatWriter:
    """Writes one reply to `console`; blue is away from the vector, orange towards it."""

    @staticmethod
    def works_on(console: Console) -> bool:
        """Whether there is a terminal behind it that shows colours."""
        return bool(console.color_system) and not console.no_color

    def __init__(self, console: Console) -> None:
        self._console = console
        self._text = ""
        self._written = 0
        self._tokens = 0
        self._scale = LEAST

    def add(self, piece: str) -> None:
        """More of the text; it is held back until it has its colours."""
        self._text += piece

    def colour(self, found: Projections) -> None:
        """Write the tokens whose values are known and whose text has come."""
        for token, value in list(zip(found.tokens, found.values, strict=False))[self._tokens :]:
            place = self._text.find(token, self._written, self._written + NEAR + len(token))
            if place < 0 and token.startswith(self._text[self._written :]):
                return  # its text is still to come
            self._tokens += 1
            if place < 0:
                continue
            self._scale = max(self._scale, abs(value))
            self._write(place)
            self._write(place + len(token), value / self._scale)

    def end(self) -> None:
        """Write what has no value: nothing reads the last token."""
        self._write(len(self._text))

    def _write(self, end: int, share: float | None = None) -> None:
        """The text up to `end`; a share of the full scale between -1 and 1 gives it a colour."""
        piece, self._written = self._text[self._written : end], end
        if not piece:
            return
        self._console.print(Text(piece, _style(share), end=""), end="", soft_wrap=True)
        self._console.file.flush()


def _style(share: float | None) -> str:
    if share is None or not abs(share) >= FAINTEST:
        return ""
    # Black can be read on every shade between white and this share of the full colour.
    strength = STRONGEST * min(1.0, abs(share))
    shade = (round(255 + (c - 255) * strength) for c in (TOWARDS if share > 0 else AWAY))
    return f"rgb(0,0,0) on rgb({','.join(map(str, shade))})"
