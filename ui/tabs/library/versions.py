"""Two revisions, or two entries, compared: by layer, block or term, and by tensor."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ui.forms import QUIET, STILL, notice, say, told, typed
from ui.markup import note, number
from ui.session import Session
from ui.tabs.library import pictures
from ui.tabs.library.shelf import named

__all__ = ["compared", "offered", "versions"]

ROWS = ["where", "what", "old", "new", "apart"]
MOST = 300
LONGEST = 120


def versions(session: Session, entry: gr.Dropdown) -> None:
    """Lay the part out and wire it."""
    with gr.Accordion("Compare two versions", open=False, elem_id="library-versions"):
        with gr.Row():
            old = _choice("Old", "library-old")
            new = _choice("New", "library-new")
            button = gr.Button("Compare", scale=0, min_width=140, elem_id="library-compare")
        box = notice("library-versions-notice")
        with gr.Column(visible=False) as result:
            chart = gr.Plot(label="What differs", elem_id="library-versions-chart")
            with gr.Accordion("The same as a table", open=False, elem_id="library-versions-twin"):
                table = gr.Dataframe(
                    headers=ROWS,
                    datatype="str",
                    interactive=False,
                    max_height=420,
                    elem_id="library-versions-table",
                )

    def offer(name: str | None) -> tuple[Any, ...]:
        return *offered(session, name), gr.update(visible=False)

    def compare(old: str | None, new: str | None) -> tuple[Any, ...]:
        return compared(session, old, new)

    entry.change(told(3)(offer), entry, [box, old, new, result], **STILL)
    button.click(told(3)(compare), [old, new], [box, result, chart, table], **QUIET)


def _choice(label: str, elem_id: str) -> gr.Dropdown:
    return gr.Dropdown(
        [],
        label=label,
        info="A name, name@2, name@date, name@tag or a digest.",
        allow_custom_value=True,
        elem_id=elem_id,
    )


def offered(session: Session, name: str | None) -> tuple[Any, ...]:
    """The chosen entry's revisions, then all other names; the last two revisions are chosen."""
    if not name:
        return gr.update(choices=[], value=None), gr.update(choices=[], value=None)
    library = session.wb.library
    own = [f"{past.name}@{past.revision}" for past in library.history(name)]
    names = [*own, *(other.name for other in library.list() if other.name != name)]
    old = own[1] if len(own) > 1 else own[0]
    return gr.update(choices=names, value=old), gr.update(choices=names, value=own[0])


def compared(session: Session, old: str | None, new: str | None) -> tuple[Any, ...]:
    """The sentence, the picture and the rows; nothing but the sentence where all is the same."""
    found = session.wb.difference(named(typed(old)), named(typed(new)))
    if found["equal"]:
        words = "They are the same, bit for bit."
        return say(note(words, "good")), gr.update(visible=False), None, []
    return (
        say(note(_words(found), "plain")),
        gr.update(visible=True),
        pictures.differences(found),
        _rows(found),
    )


def _words(found: dict[str, Any]) -> list[str]:
    old, new = found["names"]
    words = [f"From '{old}' to '{new}':"]
    if found["tensors"]:
        words.append(
            f"{len(found['tensors'])} tensors differ, {found['same']} are the same. Norms and "
            "bounds come from what is stored; no weight is read."
        )
    if len(found["tensors"]) > MOST:
        words.append(f"The table has the {MOST} that differ most.")
    if found["blocks"]:
        words.append("Directions are compared by block; a cosine of 1 is the same direction.")
    if not found["same_base"]:
        words.append("They belong to different models, so that how far apart is not known.")
    if len(set(found["kinds"])) > 1:
        words.append(f"One is a {found['kinds'][0]}, the other a {found['kinds'][1]}.")
    return words


def _rows(found: dict[str, Any]) -> list[list[str]]:
    tensors = sorted(found["tensors"], key=lambda row: -(row["most"] or 0.0))
    rows = [
        [
            row["name"], row["state"], number(row["old_norm"]), number(row["new_norm"]),
            f"{number(row['least'])} to {number(row['most'])}",
        ]
        for row in tensors[:MOST]
    ]  # fmt: skip
    rows += [
        [
            f"block {row['block']}", "direction", number(row["old_norm"]), number(row["new_norm"]),
            f"cosine {number(row['cosine'])}",
        ]
        for row in found["blocks"]
    ]  # fmt: skip
    rows += [
        [row["name"], "weight", number(row["old"]), number(row["new"]), ""]
        for row in found["terms"]
    ]
    rows += [[name, "file", "", state, ""] for name, state in found["files"].items()]
    rows += [
        [key, "information", str(was)[:LONGEST], str(is_)[:LONGEST], ""]
        for key, (was, is_) in found["info"].items()
    ]
    return rows
