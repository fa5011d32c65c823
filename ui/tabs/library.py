"""Library: everything that was kept, its history, and what can be made of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from ui.help import guide, help_for
from ui.markup import facts, lead, log_box, note, number, progress, seconds, size
from ui.session import Session, notice, say, told, typed
from ui.tabs.exchange import bring_in, lay_out, make_file
from vectors.errors import InputError

__all__ = ["build", "when"]

ROWS = ["name", "kind", "revision", "made", "model", "size", "state"]
HISTORY = ["revision", "made", "digest", "what happened"]
RUNS = ["run", "kind", "state", "asked for", "took", "words"]
MOST_RUNS = 100
MOST_LOG = 1000
VECTOR_FILE = "vector.safetensors"
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def when(moment: object) -> str:
    """A time for people, from seconds or ISO text."""
    if isinstance(moment, int | float):
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))
    text = str(moment or "")
    return f"{text[:16].replace('T', ' ')} UTC" if text else ""


def build(session: Session) -> gr.Tab:
    """Lay the tab out and wire it."""
    with gr.Tab("Library", id="library", elem_id="tab-library") as tab:
        gr.HTML(lead(guide("Library")))
        box = notice("library-notice")
        used = gr.HTML(elem_id="library-use")
        table = gr.Dataframe(
            headers=ROWS,
            datatype="str",
            interactive=False,
            max_height=320,
            label="Entries; click one to see it",
            elem_id="library-table",
        )
        with gr.Row():
            entry = gr.Dropdown(
                [], label="Entry", info="The entry that the rest of this tab is about.",
                elem_id="library-entry",
            )  # fmt: skip
            refresh = gr.Button("Refresh", scale=0, min_width=140, elem_id="library-refresh")
        shelf = [box, used, table, entry]
        details = _details()
        _acts(session, entry, shelf)
        _recipes(session, entry, shelf)
        _files(session, entry, shelf)
        _runs(session, tab)

    def fill(chosen: str | None) -> tuple[Any, ...]:
        return _filled(session, chosen)

    fresh: dict[str, Any] = {
        "fn": told(3)(fill), "inputs": entry, "outputs": shelf, "queue": False, **QUIET,
    }  # fmt: skip
    for event in (tab.select, session.page.load, refresh.click):
        event(**fresh)

    def clicked(event: gr.SelectData) -> Any:
        return str(event.row_value[0]) if event.row_value else gr.skip()

    table.select(clicked, outputs=entry, queue=False, **QUIET)
    entry.change(told(4)(lambda name: _described(session, name)), entry, details, **QUIET)
    return tab


def _filled(session: Session, chosen: str | None) -> tuple[Any, ...]:
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
    words = (
        f"{len(rows)} entries, {size(session.wb.library.total_use())} on this disk."
        if rows
        else "Nothing is kept yet."
    )
    kept = chosen if chosen in names else (names[0] if names else None)
    return note(words, "plain"), cells, gr.update(choices=names, value=kept)


# -- details ------------------------------------------------------------------------------------


def _details() -> list[Any]:
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


# -- acts ---------------------------------------------------------------------------------------


def _acts(session: Session, entry: gr.Dropdown, shelf: list[Any]) -> None:
    with gr.Accordion("Rename, delete", open=False, elem_id="library-acts"):
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
            undo = gr.Button("Restore", scale=0, min_width=140, elem_id="library-undo")
    bin_ = [gone_row, gone]

    def renamed(old: str | None, new: str) -> tuple[Any, ...]:
        named = typed(new)
        session.wb.library.rename(_named(old), named)
        words = f"'{old}' is now called '{named}'."
        return say(note(words, "good")), *_filled(session, named)

    def asked(chosen: str | None) -> tuple[Any, ...]:
        words = f"Delete '{_named(chosen)}'? Its revisions are kept, so that it can be restored."
        return say(note(words)), gr.update(visible=True)

    def deleted(chosen: str | None) -> tuple[Any, ...]:
        session.wb.library.delete(_named(chosen))
        words = say(note(f"'{chosen}' is deleted; 'Restore' brings it back.", "good"))
        return words, *_filled(session, None), gr.update(visible=False), *_gone(session)

    def restored(name: str | None) -> tuple[Any, ...]:
        session.wb.library.restore(_named(name))
        words = say(note(f"'{name}' is back.", "good"))
        return words, *_filled(session, name), *_gone(session)

    rename.click(told(3)(renamed), [entry, name], shelf, **QUIET)
    delete.click(told(1)(asked), entry, [shelf[0], sure], queue=False, **QUIET)
    no.click(_kept, None, [shelf[0], sure], queue=False, **QUIET)
    yes.click(told(6)(deleted), entry, [*shelf, sure, *bin_], **QUIET)
    undo.click(told(5)(restored), gone, [*shelf, *bin_], **QUIET)
    session.page.load(told(2)(lambda: _gone(session)), None, [shelf[0], *bin_], **QUIET)


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


def _named(name: str | None) -> str:
    if not name:
        raise InputError("Choose an entry first.")
    return name


def _recipes(session: Session, entry: gr.Dropdown, shelf: list[Any]) -> None:
    wb = session.wb
    with gr.Accordion("Make a recipe of task vectors", open=False, elem_id="library-recipes"):
        gr.HTML(
            lead(
                "A recipe is a sum of task vectors, worked out from the untrained model; leaving "
                "one out removes its behaviour exactly."
            )
        )
        with gr.Row():
            terms = gr.Textbox(
                label="Task vectors",
                info=help_for("terms"),
                placeholder="cheerful-baked=1,formal-baked=-0.5",
                max_length=2000,
                elem_id="library-terms",
            )
            weight = gr.Number(
                0.5, label="Weight", info=help_for("scale"), elem_id="library-weight"
            )
            name = gr.Textbox(
                label="Name of the recipe", max_length=100, elem_id="library-recipe-name"
            )
        with gr.Row():
            combine = gr.Button("Combine the task vectors", elem_id="library-combine")
            negate = gr.Button("Negate the chosen entry", elem_id="library-negate")
            scale = gr.Button("Scale the chosen entry", elem_id="library-scale")

    def kept(make: Callable[[], dict[str, Any]]) -> tuple[Any, ...]:
        made = make()
        words = f"Kept '{made['name']}' revision {made['revision']}: {made['terms']}."
        return (say(note(words, "good")), *_filled(session, made["name"]))

    def combined(text: str, called: str) -> tuple[Any, ...]:
        return kept(lambda: wb.combine(typed(called), typed(text)))

    def negated(chosen: str | None, called: str) -> tuple[Any, ...]:
        return kept(lambda: wb.negate(_named(chosen), typed(called)))

    def scaled(chosen: str | None, by: float | None, called: str) -> tuple[Any, ...]:
        if by is None:
            raise InputError("Give a weight; 1 is as trained.")
        return kept(lambda: wb.scale(_named(chosen), by, typed(called)))

    combine.click(told(3)(combined), [terms, name], shelf, **QUIET)
    negate.click(told(3)(negated), [entry, name], shelf, **QUIET)
    scale.click(told(3)(scaled), [entry, weight, name], shelf, **QUIET)


def _files(session: Session, entry: gr.Dropdown, shelf: list[Any]) -> None:
    parts = lay_out()

    def made(chosen: str | None, format: str) -> tuple[Any, ...]:
        path = make_file(session, _named(chosen), format)
        return say(note(f"'{path.name}' is ready.", "good")), gr.update(
            visible=True, value=str(path)
        )

    def brought(
        path: str | None,
        name: str,
        format: str,
        doses: str,
        block: float | None,
        chosen: str | None,
    ) -> tuple[Any, ...]:
        told = bring_in(session, path, typed(name), format, doses, block, chosen)
        words = f"Kept '{told['name']}' revision {told['revision']}, a {told['kind']}."
        return (say(note([words, *told["notes"]], "good")), *_filled(session, told["name"]))

    parts["make"].click(told(1)(made), [entry, parts["out"]], [shelf[0], parts["got"]], **QUIET)
    inputs = [parts[key] for key in ("file", "name", "kind", "doses", "block")]
    parts["bring"].click(told(3)(brought), [*inputs, entry], shelf, **QUIET)


# -- runs ---------------------------------------------------------------------------------------


def _runs(session: Session, tab: gr.Tab) -> None:
    runs = session.wb.runs
    with gr.Accordion("Runs", open=True, elem_id="library-runs"):
        box = notice("runs-notice")
        table = gr.Dataframe(
            headers=RUNS,
            datatype="str",
            interactive=False,
            max_height=260,
            label="Runs of all kinds, the newest first; click one to see it",
            elem_id="runs-table",
        )
        with gr.Row():
            chosen = gr.Dropdown([], label="Run", elem_id="runs-chosen")
            cancel = gr.Button("Cancel run", variant="stop", scale=0, min_width=160,
                               elem_id="runs-cancel")  # fmt: skip
        bar = gr.HTML(elem_id="runs-progress")
        lines = gr.HTML(elem_id="runs-log")
    timer = gr.Timer(3)

    def fill(run_id: str | None) -> tuple[Any, ...]:
        views = runs.list()[:MOST_RUNS]
        rows = [
            [
                v.id, v.kind, v.state.state, when(v.record.asked_at), seconds(v.seconds),
                v.state.error or v.state.words,
            ]
            for v in views
        ]  # fmt: skip
        names = [v.id for v in views]
        kept = run_id if run_id in names else (names[0] if names else None)
        return (rows, gr.update(choices=names, value=kept), *described(kept))

    def described(run_id: str | None) -> tuple[Any, ...]:
        if not run_id:
            return note("No run yet.", "plain"), "", gr.update(interactive=False)
        view = runs.get(run_id)
        state = view.state
        look = progress(
            state.state, state.share, state.words, view.seconds, view.seconds_left, state.error
        )
        return look, log_box(view.log_tail()), gr.update(interactive=not view.ended)

    def stopped(run_id: str | None) -> tuple[Any, ...]:
        runs.cancel(_named(run_id))
        return (say(note("The run stops at its next safe point.", "plain")),)

    def clicked(event: gr.SelectData) -> Any:
        return str(event.row_value[0]) if event.row_value else gr.skip()

    fresh: dict[str, Any] = {
        "fn": told(5)(fill),
        "inputs": chosen,
        "outputs": [box, table, chosen, bar, lines, cancel],
        "queue": False,
        **QUIET,
    }
    for event in (timer.tick, tab.select, session.page.load):
        event(**fresh)
    table.select(clicked, outputs=chosen, queue=False, **QUIET)
    chosen.change(told(3)(described), chosen, [box, bar, lines, cancel], queue=False, **QUIET)
    cancel.click(told(0)(stopped), chosen, box, queue=False, **QUIET)
