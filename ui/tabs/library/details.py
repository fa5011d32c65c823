"""One entry: what it is, its history, its file, and where it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr

from ui.forms import QUIET, notice, say, told
from ui.markup import facts, note, number, size, when
from ui.session import Session
from ui.tabs.library.shelf import named
from vectors.formats import write_atomic

__all__ = ["details"]

HISTORY = ["revision", "made", "digest", "what happened"]
VECTOR_FILE = "vector.safetensors"


def details(session: Session, entry: gr.Dropdown) -> None:
    """Lay the part out and fill it whenever another entry is chosen."""
    shown, button = _lay()

    def describe(name: str | None) -> tuple[Any, ...]:
        return _described(session, name)

    def sign(name: str | None) -> tuple[Any, ...]:
        made = session.wb.sign(named(name))
        words = "All of it is signed already."
        if made:
            kinds = " and ".join(dict.fromkeys(row["kind"] for row in made))
            words = f"Signed: {kinds}, by this home's key {made[0]['key']}."
        return say(note(words, "good")), *_described(session, name)[-4:]

    entry.change(told(4)(describe), entry, shown, **QUIET)
    button.click(told(4)(sign), entry, shown, **QUIET)


def _lay() -> tuple[list[Any], gr.Button]:
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
            sign = gr.Button("Sign its verdicts and evaluations", size="sm", elem_id="library-sign")
    return [box, summary, history, download, origin], sign


def _described(session: Session, name: str | None) -> tuple[Any, ...]:
    if not name:
        return say(), "", [], gr.update(visible=False), ""
    library = session.wb.library
    found = library.get(name)
    rows = [
        [str(past.revision), when(past.created), past.digest[:12], _words(past.info)]
        for past in library.history(name)
    ]
    signatures = session.wb.signatures(name)
    signers = dict.fromkeys(_signer(row) for row in signatures if row["holds"])
    summary = facts(
        {
            "name": f"{found.name} (revision {found.revision})",
            "kind": found.kind,
            "digest": found.digest,
            "made for base": found.base or "",
            "made": when(found.created),
            "size": size(library.disk_use(found)),
            **({"signed by": ", ".join(signers)} if signers else {}),
        }
    )
    download = gr.update(visible=False)
    if VECTOR_FILE in found.manifest.files:
        download = gr.update(visible=True, value=str(_exported(session, found)))
    origin = {"info": dict(found.info), "verdict": session.wb.verdict(name)}
    text = json.dumps(origin, indent=1, ensure_ascii=False, default=str)
    broken = [row["words"] for row in signatures if not row["holds"]]
    return say(note(broken)), summary, rows, download, text


def _signer(row: dict[str, Any]) -> str:
    """Whose signature it is, in a few words."""
    return f"{row['key'][:16]} ({row['kind']}{', this home' if row['own'] else ''})"


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
        write_atomic(target, session.wb.library.read_file(found, VECTOR_FILE))
    return target
