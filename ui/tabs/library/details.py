"""One entry: what it is, its history, its file, and where it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr

from ui.forms import QUIET, notice, told
from ui.markup import facts, number, size, when
from ui.session import Session

__all__ = ["details"]

HISTORY = ["revision", "made", "digest", "what happened"]
VECTOR_FILE = "vector.safetensors"


def details(session: Session, entry: gr.Dropdown) -> None:
    """Lay the part out and fill it whenever another entry is chosen."""
    shown = _lay()

    def describe(name: str | None) -> tuple[Any, ...]:
        return _described(session, name)

    entry.change(told(4)(describe), entry, shown, **QUIET)


def _lay() -> list[Any]:
    with gr.Accordion("Details", open=True, elem_id="library-details"):
        box = notice("library-details-notice")
        summary = gr.HTML(elem_id="library-summary")
        history = gr.Dataframe(
            headers=HISTORY,
            datatype="str",
            interactive=False,
            max_height=220,
            label="History, the newest first",
            elem_id="library-history",
        )
        download = gr.DownloadButton(
            "Download the vector file", visible=False, size="sm", elem_id="library-download"
        )
        with gr.Accordion("Where it comes from (JSON)", open=False, elem_id="library-json"):
            origin = gr.Code(language="json", interactive=False, label="Provenance")
    return [box, summary, history, download, origin]


def _described(session: Session, name: str | None) -> tuple[Any, ...]:
    if not name:
        return "", [], gr.update(visible=False), ""
    library = session.wb.library
    found = library.get(name)
    rows = [
        [str(past.revision), when(past.created), past.digest[:12], _words(past.info)]
        for past in library.history(name)
    ]
    summary = facts(
        {
            "name": f"{found.name} (revision {found.revision})",
            "kind": found.kind,
            "digest": found.digest,
            "made for base": found.base or "",
            "made": when(found.created),
            "size": size(library.disk_use(found)),
        }
    )
    download = gr.update(visible=False)
    if VECTOR_FILE in found.manifest.files:
        download = gr.update(visible=True, value=str(_exported(session, found)))
    origin = {"info": dict(found.info), "verdict": session.wb.verdict(name)}
    return summary, rows, download, json.dumps(origin, indent=1, ensure_ascii=False, default=str)


def _words(info: Any) -> str:
    """What a revision was made of, in a few words."""
    dose = info.get("dose")
    parts = [info.get("method"), info.get("written"), dose is not None and f"dose {number(dose)}"]
    return ", ".join(str(part) for part in parts if part)


def _exported(session: Session, found: Any) -> Path:
    """The vector's file under a name that says what it is, where the page may serve it from."""
    folder = session.wb.home.engines / "cache" / "page" / found.digest[:12]
    target = folder / f"{found.name}.safetensors"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        target.write_bytes(session.wb.library.read_file(found, VECTOR_FILE))
    return target
