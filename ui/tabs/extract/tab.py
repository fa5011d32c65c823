"""The tab's layout and its events."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ui.charts import separation
from ui.forms import QUIET, notice, told, typed
from ui.help import guide, help_for
from ui.markup import lead, note, number, seconds
from ui.panel import RunPanel
from ui.reload import remember
from ui.session import Session
from ui.tabs.extract.own_set import own_set
from ui.tabs.extract.pairs import about, pairs_table
from vectors.errors import InputError

__all__ = ["build"]

COLUMNS = ["prompt", "positive", "negative", "used for"]
METHODS = ["mean-difference", "pca", "logistic"]
POSITIONS = [
    ("mean over the reply", "completion-mean"),
    ("last token of the reply", "last"),
]
READERS = [("a copy of the model", "model"), ("the engine", "engine")]
BLOCKS = ["block", "AUROC", "Cohen's d", "pair accuracy", "agreement", "norm"]


def build(session: Session) -> gr.Tab:
    """Lay the tab out and wire it."""
    with gr.Tab("Extract", id="extract", elem_id="tab-extract") as tab:
        gr.HTML(lead(guide("Extract")))
        with gr.Row():
            with gr.Column(scale=3, min_width=420):
                chosen = _contrast_set(session, tab)
                own_set(session, chosen)
            with gr.Column(scale=2, min_width=320):
                fields = _fields()
                panel = RunPanel(session, "extract")
        result = _result()
    panel.wire(_parameters, [chosen, *fields], _show, result)
    remember(session.page, [chosen], fields)
    return tab


def _contrast_set(session: Session, tab: gr.Tab) -> gr.Dropdown:
    sets = session.wb.contrast
    chosen = gr.Dropdown(
        sets.names(),
        value=sets.names()[0],
        label="Contrast set",
        info=help_for("contrast set"),
        elem_id="extract-set",
    )
    box = notice("extract-set-notice")
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

    def preview(named: str | None) -> tuple[Any, ...]:
        if not named:
            return (gr.skip(), gr.skip())
        found = sets.get(named)
        return (about(found), pairs_table(found))

    def refresh(named: str | None) -> tuple[Any, ...]:
        names = sets.names()
        kept = named if named in names else names[0]
        return (gr.update(choices=names, value=kept), *preview(kept))

    chosen.change(told(2)(preview), chosen, [box, counts, table], **QUIET)
    session.on_show(tab, refresh, [chosen], box, [chosen, counts, table])
    return chosen


def _fields() -> list[Any]:
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
        reader = gr.Dropdown(
            READERS,
            value="model",
            label="Read in",
            info=help_for("read in"),
            elem_id="extract-reader",
        )
    return [name, method, position, reader]


def _result() -> list[Any]:
    with gr.Column(visible=False, elem_id="extract-result") as result:
        sentence = gr.HTML(elem_id="extract-sentence")
        chart = gr.Plot(label="Separation per block", elem_id="extract-chart")
        with gr.Accordion("The same as a table", open=False, elem_id="extract-twin"):
            blocks = gr.Dataframe(headers=BLOCKS, interactive=False, elem_id="extract-blocks")
    return [result, sentence, chart, blocks]


def _parameters(contrast: str | None, called: str, by: str, at: str, where: str) -> dict[str, Any]:
    if not contrast:
        raise InputError("Choose a contrast set first.")
    kept = typed(called) or contrast
    return {"contrast": contrast, "name": kept, "method": by, "position": at, "reader": where}


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
