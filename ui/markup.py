"""The page's small pieces of HTML. Every value that comes in is escaped, by `safe`."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "alert",
    "facts",
    "lead",
    "log_box",
    "note",
    "number",
    "progress",
    "receipt",
    "safe",
    "seconds",
    "size",
    "status",
    "verdict",
    "when",
]


def safe(value: object) -> str:
    """Text that may stand anywhere in HTML."""
    return html.escape(str(value), quote=True)


def number(value: object, digits: int = 3) -> str:
    """A number for people; an absent or infinite one is 'none'."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return "none"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def seconds(value: float | None) -> str:
    """A length of time for people."""
    if value is None or not math.isfinite(value):
        return ""
    whole = max(0, round(value))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def when(moment: object) -> str:
    """A time for people, from seconds or ISO text."""
    if isinstance(moment, int | float):
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))
    text = str(moment or "")
    return f"{text[:16].replace('T', ' ')} UTC" if text else ""


def alert(sentence: str) -> str:
    """Something went wrong; read out at once by a screen reader."""
    return f'<div class="wb-box wb-bad" role="alert">{safe(sentence)}</div>'


def note(sentences: str | Sequence[str], kind: str = "warn") -> str:
    """Something to know; `kind` is warn, good or plain."""
    lines = [sentences] if isinstance(sentences, str) else sentences
    body = "<br>".join(safe(line) for line in lines if line)
    return f'<div class="wb-box wb-{safe(kind)}" role="status">{body}</div>' if body else ""


def lead(sentence: str) -> str:
    """The sentence at the head of a tab."""
    return f'<p class="wb-lead">{safe(sentence)}</p>'


def facts(rows: Mapping[str, object]) -> str:
    """Names and values in two columns."""
    cells = "".join(
        f"<div><dt>{safe(name)}</dt><dd>{safe(value)}</dd></div>" for name, value in rows.items()
    )
    return f'<dl class="wb-facts">{cells}</dl>'


def log_box(text: str) -> str:
    """Printed lines, as they are."""
    return f'<pre class="wb-log">{safe(text)}</pre>' if text else ""


STATES = {
    "queued": "Queued",
    "waiting": "Waiting for other work to end",
    "running": "Running",
    "done": "Done",
    "failed": "Failed",
    "cancelled": "Cancelled",
}


def progress(
    state: str, share: float, words: str, spent: float, left: float | None, error: str = ""
) -> str:
    """How far a run is: a bar, what it does now, and the time that is left."""
    percent = 100 if state == "done" else max(0, min(100, round(share * 100)))
    times = f"{seconds(spent)} so far" if state == "running" else seconds(spent)
    if left is not None and state == "running":
        times += f", about {seconds(left)} left"
    label = (
        f"{STATES.get(state, state)} {percent} %"
        if state == "running"
        else STATES.get(state, state)
    )
    doing = "" if state in ("failed", "done") else words
    line = ": ".join(part for part in (label, doing) if part)
    bar = (
        f'<div class="wb-bar" role="progressbar" aria-label="{safe(line)}" aria-valuemin="0" '
        f'aria-valuemax="100" aria-valuenow="{percent}"><span style="width:{percent}%"></span>'
        "</div>"
    )
    wrong = alert(error) if error else ""
    return (
        f'<div class="wb-progress" data-state="{safe(state)}"><div class="wb-line">'
        f"<span>{safe(line)}</span><span>{safe(times)}</span></div>{bar}{wrong}</div>"
    )


def status(state: str, detail: str, title: str) -> str:
    """The engine's state as a chip with words beside it."""
    return (
        f'<div class="wb-status" role="status" data-state="{safe(state)}" title="{safe(title)}">'
        f'<span class="wb-chip wb-{safe(state)}">Engine {safe(state)}</span> {safe(detail)}</div>'
    )


def verdict(result: Mapping[str, Any]) -> str:
    """Passed or not, and each rule with its own sentence."""
    passed = bool(result.get("passed"))
    head = (
        "Passed: this direction is right."
        if passed
        else "Not passed: do not rely on this direction."
    )
    rows = "".join(
        f'<li class="{"wb-yes" if rule.get("passed") else "wb-no"}"><strong>'
        f"{'✓ kept' if rule.get('passed') else '✗ broken'}: {safe(rule.get('rule', ''))}</strong> "
        f"{safe(rule.get('words', ''))}</li>"
        for rule in result.get("reasons", [])
    )
    kind = "good" if passed else "bad"
    return (
        f'<div class="wb-box wb-{kind}" role="status" data-passed="{str(passed).lower()}">'
        f'<strong class="wb-head">{head}</strong><ul class="wb-rules">{rows}</ul></div>'
    )


def receipt(reply: Any, asked: str) -> str:
    """What the engine says about a reply: how it was steered, and which weights made it."""
    given, stopped = reply.receipt, reply.finish == "cancelled"
    parts = ["Stopped"] if stopped else []
    if not asked:
        parts.append("not steered")
    elif given is not None:
        if given.projection is not None:
            met = "does not meet" if given.declined else "meets"
            parts.append(
                f"the prompt {met} the condition: its projection is {given.projection:+.3f}"
            )
        places = f"{given.prompt} prompt and {given.decode} written positions steered"
        parts.append(places + (f", {given.cached} from the cache" if given.cached else ""))
        parts.append(f"asked: {asked}")
    if reply.lora is None:
        parts.append(f"weights {reply.weights[:12]}")
    else:
        given = reply.lora
        parts.append(f"LoRA of recipe {given.recipe[:12]}, rank {given.rank}")
        parts.append(f"{given.error:.1%} of the change lost")
    if not stopped:
        parts.append(f"{reply.tokens} tokens in {reply.seconds:.1f} s")
    if reply.finish == "length":
        parts.append("cut off at the limit of tokens")
    return f'<div class="wb-receipt">{safe(" · ".join(parts))}</div>'
