"""The merge method and its options, as the registry has them.

A page's parts are made once, so there is a pool of number fields, lists and switches, as many as the
method with the most of each needs; a method takes from the pool what it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from ui.forms import STILL
from ui.help import help_for
from ui.markup import lead
from ui.session import Session

__all__ = ["Options", "kind_of"]

KINDS = ("number", "choice", "switch")


def kind_of(field: Mapping[str, Any]) -> str:
    """Which part of the pool an option takes; one that has a single value takes none."""
    if "const" in field:
        return ""
    if "enum" in field:
        return "choice"
    return "switch" if field.get("type") == "boolean" else "number"


class Options:
    """A list of methods with what each can be told; `inputs` go into `read`."""

    def __init__(self, session: Session) -> None:
        self.methods = {row["name"]: row for row in session.wb.merge_methods()}
        self.method = gr.Dropdown(
            list(self.methods),
            value="linear",
            label="Merge method",
            info=help_for("merge method"),
            elem_id="library-method",
        )
        self.about = gr.HTML(self._about("linear"), elem_id="library-method-about")
        with gr.Accordion(
            "Options of the method", open=False, visible=False, elem_id="library-options"
        ) as self.box:
            self.parts = {kind: self._pool(kind) for kind in KINDS}
        self.pool = [part for kind in KINDS for part in self.parts[kind]]
        # Not on every change: what fills the form fills the options, too.
        self.method.input(self.shown, self.method, self.outputs, **STILL)

    @property
    def inputs(self) -> list[Any]:
        """The method, then the pool."""
        return [self.method, *self.pool]

    @property
    def outputs(self) -> list[Any]:
        """What `shown` fills."""
        return [self.about, self.box, *self.pool]

    def shown(self, method: str | None, given: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
        """Fill the pool for a method, with `given` values or its defaults."""
        name = method if method and method in self.methods else "linear"
        places, updates = self._places(name), []
        for kind in KINDS:
            for index in range(len(self.parts[kind])):
                option = places[kind][index] if index < len(places[kind]) else None
                updates.append(self._update(name, kind, option, given or {}))
        return self._about(name), gr.update(visible=any(places.values())), *updates

    def read(self, method: str | None, *values: Any) -> tuple[str, dict[str, Any]]:
        """The method and its options out of `inputs`; a field that was never drawn is left out."""
        name = method if method and method in self.methods else "linear"
        places, options, rest = self._places(name), {}, list(values)
        for kind in KINDS:
            mine, rest = rest[: len(self.parts[kind])], rest[len(self.parts[kind]) :]
            fields = zip(places[kind], mine, strict=False)
            options |= {option: value for option, value in fields if value is not None}
        return name, options

    def _places(self, method: str) -> dict[str, list[str]]:
        fields = self.methods[method]["options"]
        return {kind: [o for o, f in fields.items() if kind_of(f) == kind] for kind in KINDS}

    def _pool(self, kind: str) -> Sequence[Any]:
        makers = {"number": gr.Number, "choice": gr.Dropdown, "switch": gr.Checkbox}
        most = max(len(self._places(name)[kind]) for name in self.methods)
        with gr.Row():
            return [
                makers[kind](
                    label=kind, visible=False, min_width=240, elem_id=f"library-{kind}-{index}"
                )
                for index in range(most)
            ]

    def _update(self, method: str, kind: str, option: str | None, given: Mapping[str, Any]) -> Any:
        if option is None:
            return gr.update(visible=False, value=None)
        field = self.methods[method]["options"][option]
        more = {"choices": field["enum"]} if kind == "choice" else {}
        return gr.update(
            visible=True,
            label=option.replace("_", " "),
            info=field["description"],
            value=given.get(option, field["default"]),
            **more,
        )

    def _about(self, method: str) -> str:
        row = self.methods[method]
        return lead(f"{row['summary']} {row['paper']}.")
