"""Trade files with other programs: write an entry in their formats, and read theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from ui.forms import QUIET, say, told, typed
from ui.markup import lead, note
from ui.session import Session
from ui.tabs.library.shelf import Shelf, filled, named
from vectors.errors import InputError
from vectors.formats.kinds import AUTO, FORMATS

__all__ = ["DOSES", "Parts", "bring_in", "exchange", "lay_out", "make_file"]

OUT = [(f"{r.name}: {r.label}", r.name) for r in FORMATS.values() if r.writes and r.suffix]
IN = [(f"{r.name}: {r.label}", r.name) for r in FORMATS.values() if r.reads and r.suffix]
# What the page says for the service's options.
DOSES = {
    "as the file says": "",
    "as in the chosen entry": "like",
    "dose 1 adds what the file holds": "unit",
}

Parts = dict[str, Any]


def exchange(session: Session, shelf: Shelf) -> None:
    """Lay the part out and wire it."""
    parts = lay_out()

    def made(chosen: str | None, format: str) -> tuple[Any, ...]:
        path = make_file(session, named(chosen), format)
        words = note(f"'{path.name}' is ready.", "good")
        return say(words), gr.update(visible=True, value=str(path))

    def brought(
        path: str | None,
        name: str,
        format: str,
        doses: str,
        block: float | None,
        chosen: str | None,
    ) -> tuple[Any, ...]:
        kept = bring_in(session, path, typed(name), format, doses, block, chosen)
        words = f"Kept '{kept['name']}' revision {kept['revision']}, a {kept['kind']}."
        return (say(note([words, *kept["notes"]], "good")), *filled(session, kept["name"]))

    parts["make"].click(
        told(1)(made), [shelf.entry, parts["out"]], [shelf.box, parts["got"]], **QUIET
    )
    inputs = [parts[key] for key in ("file", "name", "kind", "doses", "block")]
    parts["bring"].click(told(3)(brought), [*inputs, shelf.entry], shelf.outputs, **QUIET)


def lay_out() -> Parts:
    """Draw the accordion and return its parts by name."""
    with gr.Accordion("Files of other programs", open=False, elem_id="library-files"):
        gr.HTML(
            lead(
                "Steering vectors go out as files that other programs read, and come in from them, "
                "as do mergekit recipes. Folders (checkpoints, LoRA) go through the command line."
            )
        )
        with gr.Row():
            out = gr.Dropdown(OUT, value="gguf", label="Format", elem_id="library-export-format")
            make = gr.Button("Make a file of the chosen entry", elem_id="library-export")
            got = gr.DownloadButton("Download", visible=False, elem_id="library-export-file")
        with gr.Row():
            file = gr.File(label="File", type="filepath", elem_id="library-import-file")
            with gr.Column():
                kind = gr.Dropdown(
                    [("as the file shows", AUTO), *IN], value=AUTO, label="Format of the file",
                    elem_id="library-import-format",
                )  # fmt: skip
                doses = gr.Dropdown(
                    list(DOSES), value=next(iter(DOSES)), label="Doses",
                    info="Other programs' vectors do not say how strong they are.",
                    elem_id="library-import-doses",
                )  # fmt: skip
                block = gr.Number(
                    None, label="Block", precision=0, elem_id="library-import-block",
                    info="The one used by default, where the file holds several.",
                )  # fmt: skip
                name = gr.Textbox(label="Name", max_length=100, elem_id="library-import-name")
                bring = gr.Button("Import the file", elem_id="library-import")
    return {"out": out, "make": make, "got": got, "file": file, "kind": kind, "doses": doses,
            "block": block, "name": name, "bring": bring}  # fmt: skip


def make_file(session: Session, entry: str, format: str) -> Path:
    """Write the entry where the page may serve it from, and return the file."""
    found = session.wb.library.get(entry)
    row = FORMATS[format]
    folder = session.wb.home.engines / "cache" / "page" / found.digest[:12]
    target = folder / f"{found.name}.{row.name}{row.suffix}"
    session.wb.export(entry, target, format=row.name, force=True)
    return target


def bring_in(
    session: Session,
    path: str | None,
    name: str,
    format: str,
    doses: str,
    block: float | None,
    entry: str | None,
) -> dict[str, Any]:
    """Keep an uploaded file; see `Workbench.import_`.

    Raises:
        InputError: no file, or doses of an entry where none is chosen.
    """
    if not path:
        raise InputError("Choose a file first.")
    options: dict[str, Any] = {"format": format}
    match DOSES.get(doses, ""):
        case "like":
            if not entry:
                raise InputError("Choose the entry whose doses the vector takes.")
            options["like"] = entry
        case "unit":
            options["unit"] = "file"
    if block is not None:
        options["block"] = int(block)
    return session.wb.import_(path, name, **options)
