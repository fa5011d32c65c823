"""Property tests of the order of decisions, and what a batch holds."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vectors.errors import InputError, PromptTooLong
from workbench.train.batches import Decision, check_decisions, collate, order
from workbench.train.config import TrainConfig


def some(steered: int, replay: int) -> list[Decision]:
    kinds = ["steered"] * steered + ["replay"] * replay
    return [Decision((1, 2), (3,), kind, line) for line, kind in enumerate(kinds)]


@given(
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(1, 9),
    st.floats(0, 0.9),
    st.integers(1, 3),
    st.integers(0, 5),
)
def test_every_steered_decision_once_a_pass_and_the_share_holds(n, m, batch, share, passes, seed):
    decisions = some(n, m)
    steps = order(decisions, batch, share, passes, seed)
    assert steps == order(decisions, batch, share, passes, seed)
    flat = [i for step in steps for i in step]
    counts = Counter(flat)
    assert all(counts[i] == passes for i in range(n))
    replayed = sum(counts[i] for i in range(n, n + m))
    assert abs(replayed - n * passes * share / (1 - share)) <= 0.5
    used = [counts[i] for i in range(n, n + m)]
    assert max(used) - min(used) <= 1
    assert all(sum(i < n for i in step) <= batch for step in steps)


def test_default_share_is_two_of_eight_and_seeds_differ():
    decisions = some(24, 8)
    steps = order(decisions, 6, 0.25, 1, 0)
    assert [len(step) for step in steps] == [8] * 4
    assert all(sum(i >= 24 for i in step) == 2 for step in steps)
    assert steps != order(decisions, 6, 0.25, 1, 1)


def test_replay_needs_replay_and_something_to_learn():
    with pytest.raises(InputError, match="no replay decision"):
        order(some(3, 0), 2, 0.25, 1, 0)
    with pytest.raises(InputError, match="no steered decision"):
        order(some(0, 3), 2, 0.25, 1, 0)
    assert len(order(some(3, 0), 2, 0.0, 1, 0)) == 2


def test_batch_holds_back_the_last_context_token():
    batch = collate([Decision((1, 2, 3), (4, 5, 6)), Decision((7, 8), (9,))])
    assert batch.context_ids_BP.tolist() == [[1, 2], [0, 7]]
    assert batch.context_mask_BP.tolist() == [[True, True], [False, True]]
    assert batch.decision_ids_BT.tolist() == [[3, 4, 5], [8, 0, 0]]
    assert batch.decision_mask_BT.tolist() == [[True] * 3, [True, False, False]]
    assert batch.labels_N.tolist() == [4, 5, 6, 9]
    assert batch.labels_N.dtype == torch.int64


def test_one_token_decisions_still_have_two_positions():
    assert collate([Decision((1, 2), (3,))]).decision_ids_BT.tolist() == [[2, 0]]


@pytest.mark.parametrize(
    ("decision", "error", "words"),
    [
        (Decision((1, 2), (), line=4), InputError, "line 4 is empty"),
        (Decision((1,), (2,), line=5), InputError, "line 5 has a context of 1"),
        (Decision((1,) * 6, (2,) * 5, "replay", 6), PromptTooLong, "replay decision of line 6"),
        (Decision((1, 99), (2,), line=7), InputError, "token 99"),
        (Decision((1, 2), (-1,), line=8), InputError, "token -1"),
    ],
)
def test_bad_decisions_are_refused_by_name(decision, error, words):
    with pytest.raises(error, match=words):
        check_decisions([Decision((1, 2), (3,)), decision], window=10, vocabulary=50)


def test_nothing_to_learn_is_refused():
    with pytest.raises(InputError, match="nothing to learn"):
        check_decisions([], 10, 50)


@pytest.mark.parametrize(("batch", "replay"), [(6, 0.25), (6, 0.9), (4, 0.0), (5, 0.3), (1, 0.5)])
def test_no_step_has_more_rows_than_memory_is_counted_for(batch, replay):
    decisions = [
        Decision((1,), (2, 3), kind, 0) for kind in ("steered", "replay") for _ in range(40)
    ]
    config = TrainConfig(batch=batch, replay=replay)
    steps = order(decisions, batch, replay, 2, 0)
    assert max(map(len, steps)) == config.rows
