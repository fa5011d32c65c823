"""The tab's layout: the shelf, and what is about the entry that is chosen on it."""

from __future__ import annotations

import gradio as gr

from ui.help import guide
from ui.markup import lead
from ui.session import Session
from ui.tabs.library.acts import acts
from ui.tabs.library.bisect import bisect
from ui.tabs.library.details import details
from ui.tabs.library.exchange import exchange
from ui.tabs.library.origins import origins
from ui.tabs.library.recipes import recipes
from ui.tabs.library.runs import all_runs
from ui.tabs.library.search import search
from ui.tabs.library.shelf import Shelf
from ui.tabs.library.versions import versions

__all__ = ["build"]


def build(session: Session) -> gr.Tab:
    """Lay the tab out and wire it."""
    with gr.Tab("Library", id="library", elem_id="tab-library") as tab:
        gr.HTML(lead(guide("Library")))
        shelf = Shelf(session, tab)
        details(session, shelf.entry)
        origins(session, shelf.entry)
        versions(session, shelf.entry)
        acts(session, shelf, tab)
        recipes(session, shelf, tab)
        search(session, shelf, tab)
        bisect(session, shelf, tab)
        exchange(session, shelf)
        all_runs(session, tab)
    return tab
