"""A contrast set of one's own: a file, or pairs written into a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from ui.forms import QUIET, notice, say, told, typed
from ui.help import help_for
from ui.markup import note
from ui.session import Session
from ui.tabs.extract.pairs import counts, jsonl_of, pairs_table, slug
from vectors.errors import InputError

__all__ = ["own_set"]

BLANK = [["", "", ""] for _ in range(8)]
COLUMNS = ["prompt", "positive", "negative"]
SIDES = [("replies", "replies"), ("instructions", "instructions")]


def own_set(session: Session, chosen: gr.Dropdown) -> None:
    """Lay the part out and wire it; a set that is kept becomes the one that is `chosen`."""
    sets = session.wb.contrast
    with gr.Accordion("Use a set of your own", open=False, elem_id="set-own"):
        box = notice("set-notice")
        with gr.Row():
            name = gr.Textbox(
                label="Name of the set",
                info=help_for("own name"),
                max_length=100,
                elem_id="set-name",
            )
            replace = gr.Checkbox(
                label="Replace my set of this name",
                info="Without this, a name in use is refused.",
                elem_id="set-replace",
            )
        with gr.Tabs():
            with gr.Tab("Upload a file", elem_id="set-tab-file"):
                file = gr.File(
                    label="JSONL file: one object a line with prompt, positive and negative",
                    file_types=[".jsonl", ".json", ".txt"],
                    height=140,
                    elem_id="set-file",
                )
                keep_file = gr.Button("Keep this file as a set", elem_id="set-keep-file")
            with gr.Tab("Write pairs", elem_id="set-tab-write"):
                sides = gr.Radio(
                    SIDES,
                    value="replies",
                    label="What the two sides are",
                    info=help_for("sides"),
                    elem_id="set-sides",
                )
                editor = gr.Dataframe(
                    BLANK,
                    headers=COLUMNS,
                    datatype="str",
                    type="array",
                    interactive=True,
                    wrap=True,
                    max_height=360,
                    column_widths=["28%", "36%", "36%"],
                    label="Pairs; at least 8 over 4 prompts, 48 and more are better",
                    elem_id="set-editor",
                )
                with gr.Row():
                    copy = gr.Button("Start from the set chosen above", elem_id="set-copy")
                    keep_rows = gr.Button(
                        "Keep these pairs as a set", variant="primary", elem_id="set-keep-rows"
                    )

    def uploaded(path: str | None, called: str) -> tuple[Any, ...]:
        if not path:
            return (called,)
        found = sets.get(path)
        words = f"The file is good. {counts(found)}"
        return (say(note(words, "good")), called or slug(path))

    def keep(called: str, raw: bytes | str, over: bool) -> tuple[Any, Any]:
        if not typed(called):
            raise InputError("Give the set a name first.")
        found = sets.save(typed(called), raw, replace=over)
        words = f"Kept as '{found.name}'. {counts(found)}"
        return say(note(words, "good")), gr.update(choices=sets.names(), value=found.name)

    def keep_upload(path: str | None, called: str, over: bool) -> tuple[Any, Any]:
        if not path:
            raise InputError("Choose a file first.")
        return keep(called or slug(path), Path(path).read_bytes(), over)

    def keep_written(rows: list[list[Any]], kind: str, called: str, over: bool) -> tuple[Any, Any]:
        return keep(called, jsonl_of(rows, kind), over)

    def copied(named: str) -> tuple[Any, ...]:
        found = sets.get(named)
        rows = [row[:3] for row in pairs_table(found)]
        return (rows, "instructions" if found.by_instruction else "replies")

    file.upload(told(1)(uploaded), [file, name], [box, name], **QUIET)
    keep_file.click(told(1)(keep_upload), [file, name, replace], [box, chosen], **QUIET)
    keep_rows.click(told(1)(keep_written), [editor, sides, name, replace], [box, chosen], **QUIET)
    copy.click(told(2)(copied), chosen, [box, editor, sides], **QUIET)
