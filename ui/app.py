"""The page: a head with the model and the engine, and one tab for each step of the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from gradio import themes

from ui.forms import STILL, notice, told
from ui.help import help_for
from ui.markup import log_box, status
from ui.markup import seconds as time_words
from ui.session import Session
from ui.tabs import compare, extract, library, steer, train, verify

__all__ = ["LOOK", "make_page"]

TITLE = "Steering Workbench"
PACE = 1.5
FIT = "() => { setTimeout(() => window.dispatchEvent(new Event('resize')), 150); }"
LOOK: dict[str, Any] = {
    "theme": themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        # Fonts of the system: a page on loopback asks no other machine for anything.
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        # The theme's own greys are too faint to read.
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_700",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_cancel_background_fill="#c62828",
        button_cancel_background_fill_hover="#b3261e",
    ),
    "css_paths": [Path(__file__).with_name("style.css")],
}


def make_page(session: Session) -> gr.Blocks:
    """Lay out the whole page."""
    hour = 3600
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(hour, 24 * hour)) as page:
        session.page = page
        _head(session)
        with gr.Tabs(elem_id="tabs"):
            for module in (extract, steer, verify, train, compare, library):
                tab = module.build(session)
                # A chart that was drawn while its tab was hidden takes its width anew.
                tab.select(None, js=FIT, api_visibility="private")

        def left(browser: gr.Request) -> None:
            """End what streams to a browser that is gone; runs go on."""
            session.stops.end_all(browser.session_hash)

        page.unload(left)
    return page


def _head(session: Session) -> None:
    with gr.Row(elem_id="head", equal_height=True):
        with gr.Column(scale=2, min_width=260):
            gr.HTML(f'<h1 class="wb-title">{TITLE}</h1>')
            chip = gr.HTML(elem_id="engine-status")
        model = gr.Dropdown(
            _models(session),
            value=session.wb.model_name,
            label="Model",
            info=help_for("model"),
            allow_custom_value=True,
            scale=3,
            min_width=320,
            elem_id="model",
        )
        with gr.Column(scale=1, min_width=140, elem_id="engine-buttons"):
            start = gr.Button("Start engine", size="sm", elem_id="engine-start")
            stop = gr.Button("Stop engine", size="sm", elem_id="engine-stop")
    box = notice("engine-notice")
    with gr.Accordion(
        "What the engine printed", open=False, visible=False, elem_id="engine-log"
    ) as printed:
        lines = gr.HTML(elem_id="engine-lines")

    known = gr.State("")

    def draw(seen: str) -> tuple[Any, ...]:
        now = session.engine_status()
        stage = "" if now.stage == now.state else now.stage
        words = " · ".join(part for part in (stage, _spent(now), now.error) if part)
        begun = now.state in ("ready", "starting")
        return (
            status(now.state, words, now.url),
            gr.update(interactive=not begun),
            gr.update(interactive=begun),
            gr.update(visible=now.state in ("starting", "failed")),
            log_box(now.log) or "Nothing yet.",
            *named(seen),
        )

    def named(seen: str) -> tuple[Any, str]:
        """The model in use and its name, where another tab has chosen it since this one looked."""
        name = session.wb.model_name
        if name == seen:
            return gr.skip(), name
        return gr.update(choices=_models(session), value=name), name

    def load() -> tuple[Any, str]:
        session.greet()
        return named("")

    def use(name: str | None) -> None:
        session.use_model(name or "")

    drawn = [chip, start, stop, printed, lines, model, known]
    gr.Timer(PACE).tick(draw, known, drawn, **STILL)
    session.page.load(told(2)(load), outputs=[box, model, known], **STILL).then(
        draw, known, drawn, **STILL
    )
    # One that was refused is not left standing.
    model.input(told(0)(use), model, box, **STILL).then(lambda: draw(""), None, drawn, **STILL)
    for button, act in ((start, session.start_engine), (stop, session.stop_engine)):
        button.click(told(0)(_silent(act)), outputs=box, **STILL).then(draw, known, drawn, **STILL)


def _silent(act: Any) -> Any:
    """A handler without a value."""

    def run() -> tuple[()]:
        act()
        return ()

    return run


def _models(session: Session) -> list[tuple[str, str]]:
    rows = session.wb.models()
    choices = [(f"{row['name']} ({row['note']})", row["name"]) for row in rows]
    if session.wb.model_name not in {name for _, name in choices}:
        choices.append((session.wb.model_name, session.wb.model_name))
    return choices


def _spent(now: Any) -> str:
    return time_words(now.seconds) if now.state == "starting" and now.seconds else ""
