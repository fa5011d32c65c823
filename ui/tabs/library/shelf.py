"""The entries of the library as a table, and the one that the rest of the tab is about."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ui.forms import STILL, notice, told
from ui.markup import note, size, when
from ui.session import Session
from vectors.errors import InputError

__all__ = ["Shelf", "filled", "named"]

ROWS = ["name", "kind", "revision", "made", "model", "size", "state"]


class Shelf:
    """The upper part of the tab."""

    def __init__(self, session: Session, tab: gr.Tab) -> None:
        self.box = notice("library-notice")
        used = gr.HTML(elem_id="library-use")
        self.table = gr.Dataframe(
            headers=ROWS,
            datatype="str",
            interactive=False,
            max_height=320,
            label="Entries; click one to see it",
            elem_id="library-table",
        )
        with gr.Row():
            self.entry = gr.Dropdown(
                [],
                label="Entry",
                info="The entry that the rest of this tab is about.",
                elem_id="library-entry",
            )
            again = gr.Button("Refresh", scale=0, min_width=140, elem_id="library-refresh")
        self.parts = [used, self.table, self.entry]

        def refresh(chosen: str | None) -> tuple[Any, ...]:
            return filled(session, chosen)

        def clicked(event: gr.SelectData) -> Any:
            return str(event.row_value[0]) if event.row_value else gr.skip()

        session.on_show(tab, refresh, [self.entry], self.box, self.parts)
        again.click(told(3)(refresh), self.entry, self.outputs, **STILL)
        self.table.select(clicked, outputs=self.entry, **STILL)

    @property
    def outputs(self) -> list[Any]:
        """The box for sentences, then what `filled` fills."""
        return [self.box, *self.parts]


def filled(session: Session, chosen: str | None) -> tuple[Any, ...]:
    """The shelf's values; what was chosen stays chosen while it exists."""
    rows = session.wb.library_rows()
    rows.sort(key=lambda row: str(row["created"]), reverse=True)
    names = [row["name"] for row in rows]
    cells = [
        [
            row["name"], row["kind"], str(row["revision"]), when(row["created"]),
            row["base"], size(row["bytes"]), row["words"],
        ]
        for row in rows
    ]  # fmt: skip
    words = "Nothing is kept yet; the Extract tab makes a first steering vector."
    if rows:
        count = "1 entry" if len(rows) == 1 else f"{len(rows)} entries"
        words = f"{count}, {size(session.wb.library.total_use())} on this disk."
    kept = chosen if chosen in names else (names[0] if names else None)
    return note(words, "plain"), cells, gr.update(choices=names, value=kept)


def named(name: str | None) -> str:
    """The chosen entry.

    Raises:
        InputError: none is chosen.
    """
    if not name:
        raise InputError("Choose an entry first.")
    return name
