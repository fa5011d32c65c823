"""Coloured tokens: escaped, scaled by the strongest, and honest about the last."""

from __future__ import annotations

import re
import time

import pytest

pytest.importorskip("gradio", reason="the page's extra is not installed")

from ui.heat import GROWING, LEAST, STRONGEST, heat
from ui.streaming import Part, Stop, together
from ui.talk import proof
from workbench.engines.base import Projections, Reply


def shares(html):
    return [float(share) for share in re.findall(r"rgba\([^)]*, ([\d.]+)\)", html)]


def test_the_strongest_token_has_the_strongest_colour():
    found = heat(Projections("sunny", (" a", "b", "c"), (0.2, -0.4, 0.0)))
    assert shares(found)[:3] == pytest.approx([STRONGEST / 2, STRONGEST, 0], abs=0.006)
    assert 'title="+0.200"' in found and 'title="-0.400"' in found
    assert "the mean is -0.07" in found


def test_a_token_that_was_not_read_has_no_colour():
    found = heat(Projections("sunny", ("a", "b"), (0.2,)))
    assert '<span title="not read by the model">b</span>' in found


def test_what_is_being_written_says_so_and_waits_for_its_values():
    found = heat(Projections("sunny", ("a", "b", "<c"), (0.2,)), growing=True)
    assert found.startswith(GROWING) and GROWING not in heat(Projections("s", ("a",), (0.2,)))
    assert found.count("not read by the model yet") == 2 and "&lt;c" in found
    assert heat(Projections("sunny", ("a",), ()), growing=True) == ""


class Writes:
    """A workbench whose engine writes one reply, a piece whenever it is asked for the next."""

    def __init__(self, pieces):
        self.pieces = pieces

    def stream(self, request, cancel):
        for piece in self.pieces:
            yield piece
            time.sleep(0.3)


def test_tokens_are_coloured_before_the_reply_has_ended():
    whole = Projections("sunny", ("a", "b", "c"), (0.1, 0.2))
    reply = Reply("abc", 3, "length", "base", None, 0.1, None, whole)
    pieces = ["ab", Projections("sunny", ("a", "b"), (0.1,)), "c", reply]
    seen = []
    for parts in together(Writes(pieces), {"x": None}, Stop()):
        seen.append((parts["x"].done, proof(parts["x"], "")))
    known = [html.count("style=") - 2 for _, html in seen if html]
    assert [html for done, html in seen if not done and html.startswith(GROWING)]
    assert known == sorted(known) and known[0] == 1 and known[-1] == 2
    assert GROWING not in seen[-1][1] and "3 tokens" in seen[-1][1]


def test_a_reply_that_was_stopped_keeps_its_colours():
    part = Part("ab", projections=Projections("sunny", ("a", "b"), (0.1,)), stopped=True)
    assert "Stopped." in proof(part, "") and "rgba" in proof(part, "")


def test_nothing_is_not_painted_as_much():
    assert max(shares(heat(Projections("s", ("a",), (LEAST / 100,))))[:1]) <= STRONGEST / 100


def test_tokens_and_names_are_escaped():
    found = heat(Projections("<i>v", ("<b>x",), (0.1,)))
    assert "<b>" not in found and "<i>" not in found and "&lt;b&gt;x" in found


def test_without_projections_there_is_nothing():
    assert heat(None) == "" and heat(Projections("s", ("a",), ())) == ""
