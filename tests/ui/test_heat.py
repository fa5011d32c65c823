"""Coloured tokens: escaped, scaled by the strongest, and honest about the last."""

from __future__ import annotations

import re

import pytest

from ui.heat import LEAST, STRONGEST, heat
from workbench.engines.base import Projections


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


def test_nothing_is_not_painted_as_much():
    assert max(shares(heat(Projections("s", ("a",), (LEAST / 100,))))[:1]) <= STRONGEST / 100


def test_tokens_and_names_are_escaped():
    found = heat(Projections("<i>v", ("<b>x",), (0.1,)))
    assert "<b>" not in found and "<i>" not in found and "&lt;b&gt;x" in found


def test_without_projections_there_is_nothing():
    assert heat(None) == "" and heat(Projections("s", ("a",), ())) == ""
