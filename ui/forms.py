"""What a form does everywhere: boxes for sentences, errors told in them, text read as numbers."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gradio as gr

from ui.markup import alert
from vectors.errors import InputError, WorkbenchError

__all__ = [
    "QUIET",
    "STILL",
    "as_number",
    "as_numbers",
    "changed",
    "fault",
    "notice",
    "say",
    "told",
    "typed",
]

log = logging.getLogger("ui")

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""Options of an event that is the page's own affair: no spinner, no endpoint."""
STILL: dict[str, Any] = {**QUIET, "queue": False}
"""The same for one that only looks, and so need not wait behind what works."""


def notice(elem_id: str) -> gr.HTML:
    """An empty box for sentences."""
    return gr.HTML(visible=False, elem_id=elem_id)


def say(markup: str = "") -> Any:
    """Fill a box for sentences, or hide it."""
    return gr.update(value=markup, visible=bool(markup))


def changed(updates: Sequence[Any], values: Sequence[Any]) -> tuple[Any, ...]:
    """The updates of fields without the values that they have already.

    An answer may come late, and must not take back what a person has chosen meanwhile.
    """
    return tuple(
        {k: x for k, x in update.items() if k != "value" or x != value}
        for update, value in zip(updates, values, strict=True)
    )


def fault(error: Exception) -> str:
    """Log an error of ours that is being handled, and give the sentence that the page shows for it."""
    log.exception("a handler of the page failed")
    return alert(f"The page failed at this ({type(error).__name__}); its terminal says more.")


def told(count: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turn a handler's errors into sentences.

    The handler's `count` outputs come after one more, the box for sentences. A handler may return a
    `str` of markup for that box itself as an additional first value.
    """

    def wrap(handler: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(handler)
        def run(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
            try:
                out = handler(*args, **kwargs)
            except WorkbenchError as error:
                return (say(alert(str(error))), *[gr.skip()] * count)
            except Exception as error:
                return (say(fault(error)), *[gr.skip()] * count)
            values = out if isinstance(out, tuple) else (out,) if count else ()
            return values if len(values) == count + 1 else (say(), *values)

        return run

    return wrap


def typed(value: object) -> str:
    """What stands in a text field; a field that was never drawn has no value at all."""
    return "" if value is None else str(value).strip()


def as_number(text: object, what: str, example: str = "0.2") -> float | None:
    """A number that may be left empty; `example` is one that would do.

    Raises:
        InputError: not a number.
    """
    words = typed(text)
    if not words:
        return None
    try:
        return float(words)
    except ValueError as error:
        raise InputError(
            f"The {what} must be a number, not {words[:40]!r}; try {example}."
        ) from error


def as_numbers(text: str | None, what: str, example: str = "0.2") -> list[float]:
    """Numbers joined by commas or spaces; none is an empty list.

    Raises:
        InputError: something that is not a number.
    """
    parts: Iterable[str] = typed(text).replace(",", " ").split()
    return [value for part in parts if (value := as_number(part, what, example)) is not None]
