"""Reference and property: each operator against its closed form in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vectors.errors import GrammarError
from vectors.grammar import OPERATORS
from vectors.steering.controls import random_direction
from vectors.steering.operators import (
    Edit,
    apply_edit,
    combine,
    edit_of,
    expand_rows,
)

WIDTHS = [1, 41, 63]


def stream(width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(5, width, generator=torch.Generator().manual_seed(seed)).double() * 3


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dose", [0.0, 0.3, -1.5])
def test_operators_are_their_closed_forms(width, dose):
    h_TD, v_D = stream(width), random_direction(width, 1)
    v64_D, on_T1 = v_D.double(), (h_TD @ v_D.double())[:, None]
    moved_TD = h_TD + dose * 2.0 * v64_D
    wanted = {
        "add": moved_TD,
        "ablate": h_TD - dose * on_T1 * v64_D,
        "clamp": h_TD - on_T1 * v64_D + dose * 2.0 * v64_D,
        "turn": moved_TD * h_TD.norm(dim=1, keepdim=True) / moved_TD.norm(dim=1, keepdim=True),
    }
    assert set(wanted) == set(OPERATORS)
    for operator, wanted_TD in wanted.items():
        found_TD = apply_edit(h_TD, edit_of(operator, v_D, 2.0, dose))
        torch.testing.assert_close(found_TD, wanted_TD, rtol=1e-6, atol=1e-6)


@given(seed=st.integers(0, 1000), dose=st.floats(-3, 3), width=st.integers(2, 50))
@settings(max_examples=30, deadline=None)
def test_what_operators_promise(seed, dose, width):
    h_TD, v_D = stream(width, seed), random_direction(width, seed + 1)
    v64_D = v_D.double() / v_D.double().norm()
    ablate = edit_of("ablate", v64_D, 1.0, 1.0)
    once_TD = apply_edit(h_TD, ablate)
    assert (once_TD @ v64_D).abs().max() < 1e-5
    torch.testing.assert_close(apply_edit(once_TD, ablate), once_TD, rtol=1e-6, atol=1e-5)
    clamped_TD = apply_edit(h_TD, edit_of("clamp", v_D, 2.0, dose))
    torch.testing.assert_close(
        clamped_TD @ v64_D, torch.full((5,), 2 * dose).double(), atol=1e-4, rtol=0
    )
    turned_TD = apply_edit(h_TD, edit_of("turn", v_D, 2.0, dose))
    torch.testing.assert_close(turned_TD.norm(dim=1), h_TD.norm(dim=1))


def test_edits_that_go_together_do_not_depend_on_their_order():
    v_D, w_D = random_direction(41, 1), random_direction(41, 2)
    edits = [
        edit_of("add", v_D, 1.0, 0.5),
        edit_of("ablate", w_D, 1.0, 1.0),
        edit_of("add", w_D, 1, 2),
    ]
    one, other = combine(edits), combine(reversed(edits))
    h_TD = stream(41)
    torch.testing.assert_close(apply_edit(h_TD, one), apply_edit(h_TD, other))
    wanted_TD = h_TD + 0.5 * v_D + 2 * w_D - (h_TD @ w_D.double())[:, None] * w_D
    torch.testing.assert_close(apply_edit(h_TD, one), wanted_TD, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pair", [("ablate", "clamp"), ("turn", "add"), ("turn", "ablate")])
def test_edits_that_one_row_cannot_hold_are_refused(pair):
    v_D = random_direction(8, 1)
    with pytest.raises(GrammarError, match="one 'ablate'"):
        combine(edit_of(name, v_D, 1.0, 1.0) for name in pair)


def test_an_unknown_operator_is_refused():
    with pytest.raises(GrammarError, match="'bend' is unknown"):
        edit_of("bend", torch.ones(3), 1.0, 1.0)


def test_additions_alone_are_known_as_such():
    v_D = random_direction(8, 1)
    assert edit_of("add", v_D, 1.0, 1.0).adds_only
    assert not any(edit_of(o, v_D, 1.0, 1.0).adds_only for o in OPERATORS if o != "add")
    assert isinstance(combine([edit_of("add", v_D, 1.0, 1.0)]), Edit)


def test_rows_of_tokens_by_phase_start_and_padding():
    rows_T = torch.full((9,), 77, dtype=torch.int32)
    slots_S4 = torch.tensor([[0, 0, 3, 0], [5, 6, 3, 0], [7, 8, 4, 2]], dtype=torch.int32)
    positions_T = torch.tensor([1, 2, 3, 1, 2, 3, 4, 9, 9])
    expand_rows(rows_T, positions_T, torch.tensor([0, 3, 7, 7]), torch.tensor([1, 2]), slots_S4, 2)
    assert rows_T.tolist() == [5, 5, 6, 0, 7, 7, 8, 0, 0]
