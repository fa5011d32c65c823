"""What a form holds survives a reload of the page.

The browser keeps it, in the `sessionStorage` of its tab: two tabs on the same page hold two forms, and
what they hold is gone with them. `gr.BrowserState` would keep it in `localStorage`, which all tabs
share and which stays on the disk.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import gradio as gr

__all__ = ["recall", "remember"]

KEY = "workbench-forms"
RECALL = f"""(...values) => {{
  let kept = {{}};
  try {{ kept = JSON.parse(sessionStorage.getItem('{KEY}')) ?? {{}}; }} catch {{}}
  return IDS.map((id, i) => kept[id] ?? values[i]);
}}"""
# Fields change while the page is built, too; nothing is kept before what was kept is back.
READY = "() => { (window.workbenchForms ??= new Set()).add('NAME'); }"
# A list that the library has not filled yet holds null, or no entry, which nobody chose.
REMEMBER = f"""(...values) => {{
  if (!window.workbenchForms?.has('NAME')) return;
  let kept = {{}};
  try {{ kept = JSON.parse(sessionStorage.getItem('{KEY}')) ?? {{}}; }} catch {{}}
  const none = (value) => value === null || (Array.isArray(value) && !value.length);
  IDS.forEach((id, i) => {{ if (!none(values[i])) kept[id] = values[i]; }});
  sessionStorage.setItem('{KEY}', JSON.stringify(kept));
}}"""


def remember(page: gr.Blocks, chosen: Sequence[gr.Dropdown], fields: Sequence[Any] = ()) -> None:
    """Keep a form in the browser, and bring its `fields` back on loading.

    Args:
        page: the page that is loaded.
        chosen: lists that are filled on loading; what fills them also recalls what was chosen.
        fields: all others.
    """
    held = [*chosen, *fields]
    name = str(held[0].elem_id)
    private: Any = {"api_visibility": "private"}
    inputs = list(fields)
    back = page.load(None, inputs, inputs, js=recall(inputs), **private)
    back.then(None, js=READY.replace("NAME", name), **private)
    js = REMEMBER.replace("NAME", name).replace("IDS", _ids(held))
    gr.on([part.change for part in held], None, held, js=js, **private)


def recall(fields: Sequence[Any]) -> str:
    """A script that puts what the browser kept of `fields` in the place of their values."""
    return RECALL.replace("IDS", _ids(fields))


def _ids(fields: Sequence[Any]) -> str:
    return json.dumps([field.elem_id for field in fields])
