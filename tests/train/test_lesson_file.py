"""A lesson that was written and read again is the same lesson."""

from __future__ import annotations

import pytest
import torch

from vectors.errors import InputError
from workbench.train.batches import Decision
from workbench.train.lesson import Lesson
from workbench.train.lesson_file import load_lesson, save_lesson
from workbench.train.losses import SoftTargets


def lesson(lengths: list[int], seed: int) -> Lesson:
    torch.manual_seed(seed)
    decisions = [
        Decision((1, 2, 3 + i), tuple(range(n)), "replay" if i % 3 == 2 else "steered", i)
        for i, n in enumerate(lengths)
    ]
    return Lesson(decisions, [SoftTargets.of(torch.randn(n, 40), 8) for n in lengths])


def test_what_is_read_is_what_was_written(tmp_path):
    path = tmp_path / "x.lesson.safetensors"
    given = {"learnt": lesson([3, 1, 7, 2], 0), "held_out": lesson([5], 1)}
    save_lesson(path, given)
    found = load_lesson(path)
    assert {name: found[name].digest() for name in found} == {
        n: g.digest() for n, g in given.items()
    }
    assert found["learnt"].decisions == given["learnt"].decisions
    assert [f.name for f in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("damage", [b"", b"no tensors at all", None])
def test_a_damaged_file_is_refused_with_advice(tmp_path, damage):
    path = tmp_path / "x.lesson.safetensors"
    save_lesson(path, {"learnt": lesson([3, 1], 0)})
    path.write_bytes(path.read_bytes()[:-9] if damage is None else damage)
    with pytest.raises(InputError, match="start the training anew"):
        load_lesson(path)
