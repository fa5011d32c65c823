"""How things look in a terminal: tables, stages of a start, the bar of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import NoneType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from workbench.runs.record import RunView

__all__ = ["age", "facts", "lines", "number", "run_bar", "size", "span", "stages", "table"]


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table of plain text; columns of numbers stand to the right."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numeric = all(type(row[index]) in (int, float, NoneType) for row in rows)
        drawn.add_column(Text(column), justify="right" if rows and numeric else "left")
    for row in rows:
        drawn.add_row(*(Text(number(cell)) for cell in row))
    return drawn


def facts(values: Mapping[str, object]) -> Table:
    """Names and values, one a line."""
    drawn = Table(box=None, pad_edge=False, show_header=False)
    drawn.add_column(style="bold")
    drawn.add_column()
    for name, value in values.items():
        drawn.add_row(Text(name), Text(number(value)))
    return drawn


def number(value: object) -> str:
    """A value as text; floats with four digits, nothing as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def size(amount: int) -> str:
    """Bytes for people."""
    for unit, name in ((2**30, "GB"), (2**20, "MB"), (2**10, "KB")):
        if amount >= unit:
            return f"{amount / unit:.{0 if amount >= 10 * unit else 1}f} {name}"
    return f"{amount} B"


def span(seconds: float) -> str:
    """A length of time for people."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def age(when: float) -> str:
    """How long ago a time of the clock was."""
    return f"{span(max(0.0, time.time() - when))} ago"


@contextmanager
def stages(console: Console) -> Iterator[Callable[[str], None]]:
    """A line that says what is going on, and is gone afterwards; only on a terminal."""
    if not console.is_terminal:
        yield lambda words: None
        return
    with console.status(Text("")) as status:
        yield lambda words: status.update(Text(words))


@contextmanager
def run_bar(console: Console) -> Iterator[Callable[[RunView], None]]:
    """The bar of a run: its words, its share, the time left; only on a terminal."""
    if not console.is_terminal:
        yield lambda view: None
        return
    words = TextColumn("{task.description}", markup=False)
    left = TextColumn("{task.fields[left]}", markup=False, style="dim")
    columns = (SpinnerColumn(), words, BarColumn(), TaskProgressColumn(), left)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0, left="")

        def watch(view: RunView) -> None:
            bar.update(
                task,
                completed=view.state.share,
                description=f"{view.kind}: {view.state.words or view.state.state}",
                left="" if view.seconds_left is None else f"{span(view.seconds_left)} left",
            )

        yield watch


def lines(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> Table:
    """A table of the keys of `columns`, under their values as headings."""
    return table(list(columns.values()), [[row.get(key) for key in columns] for row in rows])
