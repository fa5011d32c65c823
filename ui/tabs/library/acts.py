"""Rename an entry, delete it, and take changes back."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ui.forms import QUIET, STILL, notice, say, told, typed
from ui.markup import note
from ui.session import Session
from ui.tabs.library.shelf import Shelf, filled, named

__all__ = ["acts"]

MOST_LOG = 1000


def acts(session: Session, shelf: Shelf, tab: gr.Tab) -> None:
    """Lay the part out and wire it."""
    with gr.Accordion("Rename, delete, undo", open=False, elem_id="library-acts"):
        sight = notice("library-acts-notice")
        with gr.Row():
            name = gr.Textbox(label="New name", max_length=100, elem_id="library-new-name")
            rename = gr.Button("Rename", scale=0, min_width=140, elem_id="library-rename")
        delete = gr.Button("Delete", variant="stop", elem_id="library-delete")
        with gr.Row(visible=False, elem_id="library-sure") as sure:
            yes = gr.Button("Yes, delete it", variant="stop", elem_id="library-delete-yes")
            no = gr.Button("No, keep it", elem_id="library-delete-no")
        with gr.Row(visible=False, elem_id="library-deleted-row") as gone_row:
            gone = gr.Dropdown(
                [], label="Deleted", info="Its revisions come back.", elem_id="library-deleted"
            )
            restore = gr.Button("Restore", scale=0, min_width=140, elem_id="library-restore")
        undo = gr.Button("Nothing to undo", interactive=False, elem_id="library-undo")
    last = gr.State(0)
    doomed = gr.State("")
    bin_ = [gone_row, gone]
    undoing = [undo, last]

    def renamed(old: str | None, new: str) -> tuple[Any, ...]:
        called = typed(new)
        session.wb.library.rename(named(old), called)
        words = f"'{old}' is now called '{called}'."
        return say(note(words, "good")), *filled(session, called)

    def asked(chosen: str | None) -> tuple[Any, ...]:
        words = f"Delete '{named(chosen)}'? Its revisions are kept, so that it can be restored."
        return say(note(words)), gr.update(visible=True), named(chosen)

    def deleted(chosen: str) -> tuple[Any, ...]:
        session.wb.library.delete(named(chosen))
        words = say(note(f"'{chosen}' is deleted; 'Restore' brings it back.", "good"))
        return words, *filled(session, None), gr.update(visible=False), *_gone(session)

    def restored(name: str | None) -> tuple[Any, ...]:
        session.wb.library.restore(named(name))
        words = say(note(f"'{name}' is back.", "good"))
        return words, *filled(session, name), *_gone(session)

    def undone(change: int, chosen: str | None) -> tuple[Any, ...]:
        done = session.wb.library.undo(change)
        words = say(note(f"Taken back: {_words(done)}.", "good"))
        return words, *filled(session, chosen), *_gone(session), *_last(session)

    def look(*_: Any) -> tuple[Any, ...]:
        return (*_gone(session), *_last(session))

    outputs, box = shelf.outputs, shelf.box
    rename.click(told(3)(renamed), [shelf.entry, name], outputs, **QUIET)
    delete.click(told(2)(asked), shelf.entry, [box, sure, doomed], **STILL)
    no.click(_kept, None, [box, sure], **STILL)
    # The one that was asked about, whichever is chosen by now.
    yes.click(told(6)(deleted), doomed, [*outputs, sure, *bin_], **QUIET)
    restore.click(told(5)(restored), gone, [*outputs, *bin_], **QUIET)
    undo.click(told(7)(undone), [last, shelf.entry], [*outputs, *bin_, *undoing], **QUIET)
    session.on_show(tab, look, [shelf.entry], sight, [*bin_, *undoing])
    # Whatever changes the library fills the shelf anew.
    shelf.table.change(told(4)(look), None, [sight, *bin_, *undoing], **STILL)


def _kept() -> tuple[Any, ...]:
    return say(), gr.update(visible=False)


def _gone(session: Session) -> tuple[Any, ...]:
    """The deleted names, the latest first."""
    library = session.wb.library
    living = {entry.name for entry in library.list()}
    last = {row.name: row.action for row in reversed(library.log(MOST_LOG))}
    names = [name for name, action in last.items() if action == "delete" and name not in living]
    names.reverse()
    return (
        gr.update(visible=bool(names)),
        gr.update(choices=names, value=names[0] if names else None),
    )


def _last(session: Session) -> tuple[Any, ...]:
    """The button that takes the last change back, and the number of that change."""
    row = session.wb.library.last_change()
    if row is None:
        return gr.update(value="Nothing to undo", interactive=False), 0
    return gr.update(value=f"Undo: {_words(row)}", interactive=True), row.id


def _words(row: Any) -> str:
    """A change in a few words, such as rename 'kind' (to warm)."""
    what = f"{row.action} '{row.name}'"
    if row.action in ("save", "revert"):
        what += f" revision {row.revision}"
    return f"{what} ({row.detail})" if row.detail else what
