"""Dropdowns of library entries, which follow the library as it changes, and the doses that go with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from ui.forms import say
from ui.help import help_for
from ui.markup import note
from ui.session import Session
from vectors.errors import InputError, NameNotFound

__all__ = [
    "TASKS",
    "VECTORS",
    "default_dose",
    "follow",
    "listed",
    "missing",
    "need_task",
    "need_vector",
    "task_choice",
    "vector_choice",
]

DEFAULT_DOSE = 0.2
VECTORS = ("steering-vector",)
TASKS = ("task-vector", "recipe")
MAKERS = {
    VECTORS: "There is no steering vector yet; make one on the Extract tab.",
    TASKS: "There is no trained result yet; make one on the Train tab.",
}


def vector_choice(elem_id: str, more: str = "") -> gr.Dropdown:
    """A dropdown of steering vectors, empty until `follow` or `listed` fills it."""
    info = f"{help_for('steering vector')} {more}".strip()
    return gr.Dropdown([], label="Steering vector", info=info, min_width=240, elem_id=elem_id)


def task_choice(elem_id: str) -> gr.Dropdown:
    """A dropdown of what was trained, empty until `follow` or `listed` fills it."""
    info = help_for("task vector")
    return gr.Dropdown([], label="Trained result", info=info, min_width=240, elem_id=elem_id)


def follow(
    session: Session, tab: gr.Tab, box: gr.HTML, choices: Mapping[gr.Dropdown, tuple[str, ...]]
) -> None:
    """Keep dropdowns up to date with the library; `box` says where a missing entry is made."""
    dropdowns, kinds = list(choices), list(choices.values())

    def refresh(*values: str | None) -> tuple[Any, ...]:
        rows = [listed(session, value, *k) for value, k in zip(values, kinds, strict=True)]
        words = [missing(row, k) for row, k in zip(rows, kinds, strict=True)]
        return (say(note(words, "plain")), *rows)

    session.on_show(tab, refresh, dropdowns, box, dropdowns)


def missing(update: Mapping[str, Any], kinds: tuple[str, ...]) -> str:
    """What to do where a dropdown has nothing to choose from."""
    return "" if update["choices"] else MAKERS[kinds]


def listed(session: Session, value: str | None, *kinds: str, verified_first: bool = False) -> Any:
    """A dropdown's update; what was chosen stays chosen while it exists and this model can use it.

    The newest entry comes first, those of this model before others.
    """
    rows = [row for row in session.wb.library_rows() if row["kind"] in kinds]
    rows.sort(key=lambda row: str(row["created"]), reverse=True)
    rows.sort(
        key=lambda row: (_foreign(session, row), verified_first and row["words"] != "verified")
    )
    # What another model's vector was chosen for lack of a better one gives way to one of this model.
    own = [row["name"] for row in rows if not _foreign(session, row)]
    names = own or [row["name"] for row in rows]
    kept = value if value in names else (names[0] if names else None)
    return gr.update(choices=[(_label(session, row), row["name"]) for row in rows], value=kept)


def _foreign(session: Session, row: Mapping[str, Any]) -> bool:
    return bool(session.base) and row["base"] != session.base


def _label(session: Session, row: Mapping[str, Any]) -> str:
    words = [row["words"]] if row["words"] else []
    if _foreign(session, row):
        words.append("made for another model")
    return f"{row['name']} ({', '.join(words)})" if words else row["name"]


def need_vector(name: str | None) -> str:
    """The chosen vector.

    Raises:
        InputError: none is chosen.
    """
    if not name:
        raise InputError("Choose a steering vector first; the Extract tab makes one.")
    return name


def need_task(name: str | None) -> str:
    """The chosen trained result.

    Raises:
        InputError: none is chosen.
    """
    if not name:
        raise InputError("Choose a trained result first; the Train tab makes one.")
    return name


def default_dose(session: Session, vector: str | None, task: str | None = None) -> float:
    """The dose that a task was trained at, else the verdict's, else the one of extraction."""
    if not vector:
        return DEFAULT_DOSE
    found = (
        _info(session, task).get("dose"),
        (session.wb.verdict(vector) or {}).get("working_dose"),
        _info(session, vector).get("suggested_dose"),
    )
    return next((float(dose) for dose in found if dose is not None), DEFAULT_DOSE)


def _info(session: Session, name: str | None) -> Mapping[str, Any]:
    try:
        return session.wb.library.get(name).info if name else {}
    except NameNotFound:
        return {}
