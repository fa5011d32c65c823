"""Property and contract: contrast sets are read, refused with line numbers, and split once."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vectors.errors import ContrastSetError, GrammarError, NameNotFound, NameTaken, WorkbenchError
from workbench.data import contrast as module
from workbench.data.contrast import (
    Builtin,
    ContrastPair,
    ContrastSet,
    ContrastSets,
    parse_contrast,
    read_contrast,
)
from workbench.settings import Home

BUILTIN = get_args(Builtin)


def row(number: int, **changes: object) -> dict[str, object]:
    """One good line."""
    pair = {"prompt": f"Prompt {number}?", "positive": f"Yes {number}", "negative": f"No {number}"}
    return {**pair, **changes}


def lines(rows: Sequence[object]) -> bytes:
    """A file of rows."""
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


GOOD = [row(n) for n in range(12)]


def test_a_good_file() -> None:
    found = parse_contrast("mine", lines(GOOD))
    assert len(found.pairs) == 12
    assert len(found.train) + len(found.held_out) == 12
    assert not found.by_instruction


def test_instructions_are_a_kind_of_their_own() -> None:
    rows = [
        {"prompt": f"P{n}", "positive_instruction": "Be kind.", "negative_instruction": "Be rude."}
        for n in range(9)
    ]
    assert parse_contrast("mine", lines(rows)).by_instruction


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([*GOOD, row(99, negative="")], "line 13 needs both"),
        ([*GOOD, row(99, negative="Yes 99")], "line 13 has the same text on both sides"),
        ([*GOOD, row(99, extra=1)], "line 13 has an unknown field 'extra'"),
        ([*GOOD, {"positive": "a", "negative": "b"}], "line 13 'prompt'"),
        ([*GOOD, row(99, prompt=7)], "line 13 'prompt'"),
        ([*GOOD, row(99, prompt="   ")], "line 13 'prompt'"),
        ([*GOOD, row(99, positive_instruction="x")], "line 13 has completions and instructions"),
        ([*GOOD, ["a", "list"]], "line 13 is not a JSON object"),
        ([row(n, negative="") for n in range(9)], "and 4 more lines"),
        (GOOD[:5], "5 pairs over 5 prompts"),
        ([row(n, prompt="Same") for n in range(12)], "12 pairs over 1 prompts"),
        ([row(n, prompt="same" + " " * n) for n in range(12)], "12 pairs over 1 prompts"),
        (GOOD * 2, "repeats 12 of its 24 pairs"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(rows: list[object], words: str) -> None:
    with pytest.raises(ContrastSetError) as told:
        parse_contrast("mine", lines(rows))
    assert words in str(told.value)
    assert "'mine'" in str(told.value)


def test_mixed_kinds_are_refused() -> None:
    other = {"prompt": "P", "positive_instruction": "Be kind.", "negative_instruction": "Be rude."}
    with pytest.raises(ContrastSetError, match="mixes"):
        parse_contrast("mine", lines([*GOOD, other]))


def test_lines_are_counted_as_an_editor_counts_them() -> None:
    raw = b"\n" + lines(GOOD[:6]) + b"\n\nnot json\n" + lines(GOOD[6:])
    with pytest.raises(ContrastSetError, match="line 10 is not a JSON object"):
        parse_contrast("mine", raw)


def test_a_byte_order_mark_and_windows_line_ends_are_fine() -> None:
    expected = parse_contrast("mine", lines(GOOD))
    assert parse_contrast("mine", b"\xef\xbb\xbf" + lines(GOOD)).digest == expected.digest
    assert parse_contrast("mine", "\ufeff" + lines(GOOD).decode()).digest == expected.digest
    assert parse_contrast("mine", lines(GOOD).replace(b"\n", b"\r\n")).digest == expected.digest


@pytest.mark.parametrize("raw", [b"", b"\n\n  \n", b"\xef\xbb\xbf"])
def test_an_empty_file(raw: bytes) -> None:
    with pytest.raises(ContrastSetError, match="is empty"):
        parse_contrast("mine", raw)


def test_what_is_not_utf8_names_the_line() -> None:
    with pytest.raises(ContrastSetError, match=r"not UTF-8 text \(line 4\)"):
        parse_contrast("mine", lines(GOOD[:3]) + b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(ContrastSetError, match="not UTF-8"):
        parse_contrast("mine", lines(GOOD).decode().encode("utf-16"))
    with pytest.raises(ContrastSetError, match="not UTF-8"):
        parse_contrast("mine", '{"prompt": "\ud800"}')


def test_a_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 100)
    (tmp_path / "big.jsonl").write_bytes(lines(GOOD))
    with pytest.raises(ContrastSetError, match="use a part of it"):
        read_contrast(tmp_path / "big.jsonl")


def test_line_breaks_of_unicode_inside_a_text_do_not_cut_it() -> None:
    rows = [row(n, positive=f"one\u2028two\u0085three {n}") for n in range(9)]
    found = parse_contrast("mine", lines(rows))
    assert parse_contrast("mine", found.to_jsonl()).pairs == found.pairs


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200))
def test_hostile_files_raise_nothing_else(raw: bytes | str) -> None:
    with pytest.raises(WorkbenchError):
        parse_contrast("mine", raw)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from("abcdefghijkl"), min_size=8, max_size=40),
    st.randoms(use_true_random=False),
)
def test_the_split_is_stable_and_disjoint_by_prompt(
    letters: list[str], shuffler: random.Random
) -> None:
    pairs = [
        ContrastPair.model_validate(row(n, prompt=f"{letter} {'x' * (n % 2)}"))
        for n, letter in enumerate(letters)
    ]
    if len({p.key for p in pairs}) < 4:
        return
    found = ContrastSet("s", tuple(pairs))
    assert {p.key for p in found.train}.isdisjoint(p.key for p in found.held_out)
    assert len({p.key for p in found.train}) >= 2 and len({p.key for p in found.held_out}) >= 2
    shuffled = pairs.copy()
    shuffler.shuffle(shuffled)
    again = ContrastSet("s", tuple(shuffled))
    assert {p.positive for p in again.held_out} == {p.positive for p in found.held_out}


def test_prompts_that_differ_by_case_and_space_stay_together() -> None:
    pairs = [ContrastPair.model_validate(row(n, prompt=p)) for n, p in enumerate(["A b", "a  B"])]
    assert pairs[0].key == pairs[1].key
    assert pairs[0].held_out == pairs[1].held_out


def test_more_pairs_do_not_move_the_others() -> None:
    few, more = parse_contrast("s", lines([row(n) for n in range(40)])), None
    more = parse_contrast("s", lines([row(n) for n in range(80)]))
    assert {p.prompt for p in few.held_out} <= {p.prompt for p in more.held_out}


# -- sets by name -----------------------------------------------------------------------------------


@pytest.fixture
def sets(tmp_path: Path) -> ContrastSets:
    return ContrastSets(Home.at(tmp_path / "home"))


def test_sets_are_kept_found_and_deleted(sets: ContrastSets, tmp_path: Path) -> None:
    kept = sets.save("mine", lines(GOOD))
    assert sets.get("mine").digest == kept.digest
    assert sets.names() == [*BUILTIN, "mine"]
    with pytest.raises(NameTaken):
        sets.save("mine", lines(GOOD))
    sets.save("mine", lines(GOOD[:9]), replace=True)
    assert len(sets.get("mine").pairs) == 9
    with pytest.raises(ContrastSetError):
        sets.save("mine", b"nonsense", replace=True)
    assert len(sets.get("mine").pairs) == 9
    sets.delete("mine")
    with pytest.raises(NameNotFound):
        sets.get("mine")
    assert sorted(f.name for f in sets.folder.iterdir()) == []


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin_sets_can_neither_be_replaced_nor_deleted(sets: ContrastSets, name: str) -> None:
    with pytest.raises(NameTaken):
        sets.save(name, lines(GOOD), replace=True)
    with pytest.raises(NameNotFound):
        sets.delete(name)


@pytest.mark.parametrize("name", ["../x", "", ".", "A", "a/b", "a\0", "~nobody-here/x", "x" * 5000])
def test_names_that_are_no_names(sets: ContrastSets, name: str) -> None:
    with pytest.raises((NameNotFound, ContrastSetError)):
        sets.get(name)
    with pytest.raises(NameNotFound):
        sets.delete(name)
    with pytest.raises(GrammarError):
        sets.save(name, lines(GOOD))


def test_a_file_is_a_set(sets: ContrastSets, tmp_path: Path) -> None:
    (tmp_path / "own file.jsonl").write_bytes(lines(GOOD))
    assert sets.get(str(tmp_path / "own file.jsonl")).name == "own file"
    with pytest.raises(NameNotFound):
        sets.get(str(tmp_path))


# -- the built-in sets ------------------------------------------------------------------------------


def words(text: str) -> set[str]:
    """The words of a text."""
    return set(re.findall(r"\w+", text.lower()))


@pytest.mark.parametrize("name", BUILTIN)
def test_a_builtin_set_is_large_and_split_well(sets: ContrastSets, name: str) -> None:
    found = sets.get(name)
    assert found.builtin and found.about
    assert len(found.pairs) >= 96
    assert 0.15 <= len(found.held_out) / len(found.pairs) <= 0.35


@pytest.mark.parametrize("name", BUILTIN)
def test_a_builtin_set_has_no_near_duplicates(sets: ContrastSets, name: str) -> None:
    bags = [words(p.prompt) for p in sets.get(name).pairs]
    for i, one in enumerate(bags):
        for other in bags[:i]:
            assert len(one & other) / len(one | other) < 0.6, (one, other)


@pytest.mark.parametrize("name", BUILTIN)
def test_a_builtin_set_matches_lengths(sets: ContrastSets, name: str) -> None:
    pairs = sets.get(name).pairs
    positive = sum(len(p.positive.split()) for p in pairs)
    negative = sum(len(p.negative.split()) for p in pairs)
    if name == "brief":
        assert positive < negative / 2
    else:
        assert 0.9 < positive / negative < 1.1


@pytest.mark.parametrize("name", BUILTIN)
@pytest.mark.parametrize("side", ["positive", "negative"])
def test_a_builtin_set_has_no_favourite_opening(sets: ContrastSets, name: str, side: str) -> None:
    pairs = sets.get(name).pairs
    openings = Counter(" ".join(getattr(p, side).lower().split()[:3]) for p in pairs)
    opening, count = openings.most_common(1)[0]
    assert count <= 3, f"{count} times {opening!r}"
