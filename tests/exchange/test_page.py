"""The page's part: the same files, and refusals that become sentences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ui.session import Session
from ui.tabs.library.exchange import bring_in, lay_out, make_file
from vectors.errors import InputError, NameNotFound
from vectors.formats.kinds import AUTO, FORMATS
from vectors.types import SteeringVector
from workbench.service import Workbench


@pytest.fixture
def session(tiny_home: Path, tiny: object) -> Session:
    wb = Workbench(tiny_home, "tiny")
    v = torch.eye(64)
    base = wb.model().base
    wb.library.save_vector("page", SteeringVector(base, {1: v[0], 2: v[1]}, {1: 2.0, 2: 3.0}, 2))
    return Session(wb, autostart=False)


def test_every_format_that_is_offered_is_made_and_comes_back(session: Session) -> None:
    for row in FORMATS.values():
        if row.holds == "steering-vector" and row.writes:
            path = make_file(session, "page", row.name)
            assert path.suffix == row.suffix and path.stat().st_size
            doses = "as in the chosen entry" if row.name == "svec" else "as the file says"
            told = bring_in(session, str(path), "page-back", AUTO, doses, None, "page")
            assert told["format"] == row.name
            back = session.wb.library.load_vector("page-back")[1]
            assert torch.allclose(back.addition(2, 1.0), 3 * torch.eye(64)[1])


def test_refusals_are_sentences(session: Session, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Choose a file"):
        bring_in(session, None, "x", AUTO, "as the file says", None, None)
    path = str(make_file(session, "page", "svec"))
    with pytest.raises(InputError, match="Choose the entry"):
        bring_in(session, path, "x", AUTO, "as in the chosen entry", None, None)
    with pytest.raises(InputError, match="name"):
        bring_in(session, path, "<b>x</b>", AUTO, "dose 1 adds what the file holds", 2, None)
    with pytest.raises(NameNotFound):
        make_file(session, "nothing", "gguf")


def test_the_parts_are_drawn() -> None:
    import gradio as gr

    with gr.Blocks(analytics_enabled=False):
        parts = lay_out()
    assert {"make", "got", "file", "bring"} <= set(parts)
