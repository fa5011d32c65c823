"""Extract: from pairs of texts to a direction, and where in the model it is clearest."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gradio as gr

from ui.charts import separation
from ui.help import guide, help_for
from ui.markup import lead, note, number, seconds
from ui.panel import RunPanel
from ui.session import Session, notice, say, told, typed
from vectors.errors import InputError

__all__ = ["build", "jsonl_of", "pairs_table"]

COLUMNS = ["prompt", "positive", "negative", "used for"]
BLANK = [["", "", ""] for _ in range(8)]
MOST_SHOWN = 300
METHODS = ["mean-difference", "pca", "logistic"]
POSITIONS = [
    ("mean over the reply", "completion-mean"),
    ("last token of the reply", "last"),
    ("last token of the prompt", "prompt-last"),
]
SIDES = [("replies", "replies"), ("instructions", "instructions")]
BLOCKS = ["block", "AUROC", "Cohen's d", "pair accuracy", "agreement", "norm"]


def build(session: Session) -> gr.Tab:
    """Lay the tab out and wire it."""
    sets = session.wb.contrast
    with gr.Tab("Extract", id="extract", elem_id="tab-extract") as tab:
        gr.HTML(lead(guide("Extract")))
        with gr.Row():
            with gr.Column(scale=3, min_width=420):
                chosen = gr.Dropdown(
                    sets.names(),
                    value=sets.names()[0],
                    label="Contrast set",
                    info=help_for("contrast set"),
                    elem_id="extract-set",
                )
                told_box = notice("extract-set-notice")
                counts = gr.HTML(elem_id="extract-counts")
                table = gr.Dataframe(
                    headers=COLUMNS,
                    datatype="str",
                    interactive=False,
                    wrap=True,
                    max_height=320,
                    column_widths=["27%", "31%", "31%", "11%"],
                    label="Pairs of the set",
                    elem_id="extract-pairs",
                )
            with gr.Column(scale=2, min_width=320):
                name = gr.Textbox(
                    label="Vector name",
                    info=help_for("vector name"),
                    placeholder="as the set",
                    max_length=100,
                    elem_id="extract-name",
                )
                with gr.Accordion("Advanced", open=False, elem_id="extract-advanced"):
                    method = gr.Dropdown(
                        METHODS, label="Method", info=help_for("method"), elem_id="extract-method"
                    )
                    position = gr.Dropdown(
                        POSITIONS,
                        value="completion-mean",
                        label="Position",
                        info=help_for("position"),
                        elem_id="extract-position",
                    )
                run = gr.Button("Extract", variant="primary", elem_id="extract-run")
                panel = RunPanel(session, "extract")
        _own_set(session, chosen)
        with gr.Column(visible=False, elem_id="extract-result") as result:
            sentence = gr.HTML(elem_id="extract-sentence")
            chart = gr.Plot(label="Separation per block", elem_id="extract-chart")
            with gr.Accordion("The same as a table", open=False, elem_id="extract-twin"):
                blocks = gr.Dataframe(headers=BLOCKS, interactive=False, elem_id="extract-blocks")

    def preview(named: str) -> tuple[str, list[list[str]]]:
        found = sets.get(named)
        return (_counts(found), pairs_table(found))

    shown: dict[str, Any] = {
        "fn": told(2)(preview),
        "inputs": chosen,
        "outputs": [told_box, counts, table],
        "show_progress": "hidden",
        "api_visibility": "private",
    }
    chosen.change(**shown)
    session.page.load(**shown)
    tab.select(
        lambda value: gr.update(
            choices=sets.names(), value=value if value in sets.names() else None
        ),
        chosen,
        chosen,
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )

    def parameters(contrast: str, called: str, by: str, at: str) -> dict[str, Any]:
        if not contrast:
            raise InputError("Choose a contrast set first.")
        kept = typed(called) or contrast
        return {"contrast": contrast, "name": kept, "method": by, "position": at}

    panel.follow([result, sentence, chart, blocks], _show)
    panel.starts(run, parameters, [chosen, name, method, position])
    return tab


def _counts(found: Any) -> str:
    about = f"{found.about[:1].upper()}{found.about[1:]}. " if found.about else ""
    kind = "system instructions" if found.by_instruction else "replies"
    train, held_out = len(found.train), len(found.held_out)
    cut = f" The first {MOST_SHOWN} are shown." if len(found.pairs) > MOST_SHOWN else ""
    return note(
        f"{about}{len(found.pairs)} pairs of {kind}: {train} to find the direction (train), "
        f"{held_out} kept back to check it (held out).{cut}",
        "plain",
    )


def pairs_table(found: Any) -> list[list[str]]:
    """Rows of a contrast set for a table."""
    held_out = {pair.prompt for pair in found.held_out}
    return [
        [
            pair.prompt,
            pair.positive or pair.positive_instruction,
            pair.negative or pair.negative_instruction,
            "held out" if pair.prompt in held_out else "train",
        ]
        for pair in found.pairs[:MOST_SHOWN]
    ]


# -- own sets -----------------------------------------------------------------------------------


def jsonl_of(rows: list[list[Any]], sides: str) -> str:
    """The table's rows as a contrast file; an empty row is an empty line, so that numbers agree."""
    names = ("positive", "negative")
    if sides == "instructions":
        names = ("positive_instruction", "negative_instruction")
    lines = []
    for row in rows:
        prompt, one, other = (typed(cell) for cell in [*row, "", "", ""][:3])
        pair = {"prompt": prompt, names[0]: one, names[1]: other}
        lines.append(json.dumps(pair, ensure_ascii=False) if prompt or one or other else "")
    return "\n".join(lines)


def _own_set(session: Session, chosen: gr.Dropdown) -> None:
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
                    headers=COLUMNS[:3],
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
        words = f"The file is good. {_plain_counts(found)}"
        return (say(note(words, "good")), called or slug(path))

    def keep(called: str, raw: bytes | str, over: bool) -> tuple[Any, Any]:
        if not typed(called):
            raise InputError("Give the set a name first.")
        found = sets.save(typed(called), raw, replace=over)
        words = f"Kept as '{found.name}'. {_plain_counts(found)}"
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

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    file.upload(told(1)(uploaded), [file, name], [box, name], **quiet)
    keep_file.click(told(1)(keep_upload), [file, name, replace], [box, chosen], **quiet)
    keep_rows.click(told(1)(keep_written), [editor, sides, name, replace], [box, chosen], **quiet)
    copy.click(told(2)(copied), chosen, [box, editor, sides], **quiet)


def _plain_counts(found: Any) -> str:
    return f"{len(found.pairs)} pairs: {len(found.train)} train, {len(found.held_out)} held out."


def slug(path: str) -> str:
    """A valid name from a file's name."""
    words = re.sub(r"[^a-z0-9._-]+", "-", Path(path).stem.lower()).strip("-._")
    return words or "my-set"


# -- result -------------------------------------------------------------------------------------


def _show(view: Any) -> tuple[Any, ...]:
    found = view.result()
    if view.state.state != "done" or not found:
        return (gr.update(visible=False), "", None, [])
    kinds = {"yes": "good", "marginal": "warn", "no": "bad"}
    words = [
        found["words"],
        f"'{found['name']}' revision {found['revision']}, best block {found['best_block']}, "
        f"suggested dose {number(found['suggested_dose'])}, found in {seconds(found['seconds'])}.",
    ]
    rows = [
        [row["block"]]
        + [number(row[k]) for k in ("auroc", "cohens_d", "pair_accuracy", "agreement", "norm")]
        for row in found["blocks"]
    ]
    chart = separation(found["blocks"], found["best_block"])
    kind = kinds.get(found["steerable"], "plain")
    return (gr.update(visible=True), note(words, kind), chart, rows)
