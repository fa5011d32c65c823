"""A reply's tokens, coloured by how far each lies along a vector."""

from __future__ import annotations

from typing import Any

from ui.markup import safe

__all__ = ["GROWING", "heat"]

AWAY, TOWARDS = "37, 99, 235", "234, 88, 12"
STRONGEST = 0.45
"""Opacity of the strongest colour; the text on it must stay legible in both themes."""
LEAST = 0.05
"""The smallest full scale, so that nothing is not painted as much."""


WHOLE = '<div class="wb-heat">'
GROWING = '<div class="wb-heat" data-growing>'
"""How the tokens of a reply begin that is being written; nothing else begins like this."""


def heat(projections: Any, growing: bool = False) -> str:
    """The tokens with their values behind them; nothing where none were asked for, or none have come."""
    if projections is None or not projections.values:
        return ""
    scale = max(LEAST, *(abs(value) for value in projections.values))
    known = len(projections.values)
    unread = "not read by the model yet" if growing else "not read by the model"
    painted = [
        _token(token, projections.values[n], scale)
        if n < known
        else f'<span title="{unread}">{safe(token)}</span>'
        for n, token in enumerate(projections.tokens)
    ]
    return (
        f"{GROWING if growing else WHOLE}{''.join(painted)}</div>"
        f'<div class="wb-receipt wb-heat-key">{_swatch(-scale, scale)} away from '
        f"{safe(projections.vector)} · {_swatch(scale, scale)} towards it · the mean is "
        f"{sum(projections.values) / known:+.2f}</div>"
    )


def _token(token: str, value: float, scale: float) -> str:
    return f'<span title="{value:+.3f}" style="{_paint(value, scale)}">{safe(token)}</span>'


def _swatch(value: float, scale: float) -> str:
    return f'<span style="{_paint(value, scale)}">&nbsp;{value:+.2f}&nbsp;</span>'


def _paint(value: float, scale: float) -> str:
    share = min(1.0, abs(value) / scale) * STRONGEST
    return f"background: rgba({TOWARDS if value > 0 else AWAY}, {share:.2f})"
