"""Train on data of one's own: a chat file, instructions that are stripped, or one side of a set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from ui.forms import QUIET, notice, told, typed
from ui.help import help_for
from ui.markup import lead
from ui.panel import RunPanel
from ui.reload import remember
from ui.session import Session
from ui.tabs.train.learnt import COLUMNS, lay_stripped, show
from ui.tabs.train.result import lay_result
from ui.tabs.train.settings import lay_settings, name_of_result, settings_of
from vectors.errors import InputError

__all__ = ["own_data"]

SOURCES = [
    ("a chat file", "chat"),
    ("instructions, stripped", "instructions"),
    ("one side of a contrast set", "side"),
]
MOST = 64 << 20


def own_data(session: Session, tab: gr.Tab) -> None:
    """Lay the part out and wire it."""
    sets = session.wb.contrast
    with gr.Accordion("Train on data of your own", open=False, elem_id="learn"):
        gr.HTML(lead(help_for("own data")))
        with gr.Row():
            source = gr.Radio(
                SOURCES,
                value="chat",
                label="What is learnt",
                info=help_for("learnt"),
                elem_id="learn-source",
            )
            name = name_of_result("learn", "from what is learnt")
        file = gr.File(
            label="JSONL or text file",
            file_types=[".jsonl", ".json", ".txt", ".md"],
            height=140,
            elem_id="learn-file",
        )
        text = gr.Textbox(
            label="Instructions",
            info=help_for("instructions"),
            lines=3,
            max_length=100_000,
            visible=False,
            elem_id="learn-text",
        )
        with gr.Row(visible=False) as sides:
            contrast = gr.Dropdown(
                sets.names(),
                value=sets.names()[0],
                label="Contrast set",
                info=help_for("contrast set"),
                elem_id="learn-contrast",
            )
            side = gr.Radio(
                ["positive", "negative"],
                value="positive",
                label="Side",
                info=help_for("side"),
                elem_id="learn-side",
            )
        _, settings = lay_settings("learn", "learn prompts")
        panel = RunPanel(session, "learn")
        stripped = lay_stripped()
        result = lay_result("learn", COLUMNS)

    def parameters(
        what: str, called: str, path: str | None, words: str, named: str | None, *rest: Any
    ) -> dict[str, Any]:
        chosen_side, *numbers = rest
        given, usual = _given(session, what, path, words, named, chosen_side)
        return {"name": typed(called) or usual, **given, **settings_of(*numbers)}

    def seen(what: str) -> tuple[Any, ...]:
        shown = (what != "side", what == "instructions", what == "side")
        return tuple(gr.update(visible=visible) for visible in shown)

    def refresh(named: str | None) -> tuple[Any, ...]:
        names = sets.names()
        return (gr.update(choices=names, value=named if named in names else names[0]),)

    box = notice("learn-source-notice")
    source.change(told(3)(seen), source, [box, file, text, sides], **QUIET)
    session.on_show(tab, refresh, [contrast], box, [contrast])
    panel.wire(
        parameters,
        [source, name, file, text, contrast, side, *settings],
        show,
        [*stripped, *result],
    )
    remember(session.page, [contrast], [source, name, text, side, *settings])


def _given(
    session: Session, what: str, path: str | None, words: str, named: str | None, side: str
) -> tuple[dict[str, Any], str]:
    """The source's own parameters, its files kept, and the usual name of what is learnt from it."""
    if what == "side":
        if not named:
            raise InputError("Choose a contrast set first.")
        return {"contrast": named, "side": side}, f"{named}-{side}"
    if what == "instructions" and typed(words) and not path:
        kept = session.wb.keep_data(typed(words).encode(), ".txt")
        return {"instructions": str(kept)}, "instructions-learnt"
    if not path:
        more = " or write the instructions" if what == "instructions" else ""
        raise InputError(f"Choose a file first{more}.")
    if Path(path).stat().st_size > MOST:
        raise InputError(f"The file is over {MOST >> 20} MB; give a part of it.")
    kept = session.wb.keep_data(Path(path).read_bytes(), Path(path).suffix.lower())
    key = "data" if what == "chat" else "instructions"
    return {key: str(kept)}, f"{what}-learnt"
