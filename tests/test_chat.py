"""Chat and instruction files: what is learnt, and which line is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vectors.errors import InputError
from workbench.data.chat import parse_chats
from workbench.data.instructions import read_instructions
from workbench.data.templates import context_ids, instructed, turn_ids
from workbench.models.loading import load_tokenizer
from workbench.train.data_sources import chat_decisions


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def file_of(folder: Path, *lines: Any, name: str = "chat.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def chat(*turns: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(turns)}


GOOD = chat(turn("user", "Hello?"), turn("assistant", "Yes."))


def test_marked_turns_are_the_decisions_and_else_the_last(tmp_path):
    marked = chat(
        turn("system", "Be kind."),
        turn("user", "One?"),
        turn("assistant", "1", decision=True),
        turn("user", "Two?"),
        turn("assistant", "2"),
        turn("user", "Three?"),
        turn("assistant", "3\u2028!", decision=True),
    )
    found = parse_chats(file_of(tmp_path, marked, "", GOOD))
    assert list(found.lines) == [1, 3]
    assert found.lines[1].decisions == (2, 6) and found.lines[3].decisions == (1,)
    before = found.lines[1].before(2)
    assert [m["content"] for m in before] == ["Be kind.", "One?"]
    assert "decision" not in before[0]


WRONG = [
    ("{", "line 2 is not a JSON object"),
    ("[1]", "line 2 is not a JSON object"),
    ({"messages": []}, "line 2 needs 'messages'"),
    ({**GOOD, "frob": 1}, "line 2 has an unknown field 'frob'"),
    ({"prompt": "Hello?"}, "line 2 is a prompt without an answer"),
    (chat(turn("user", "Hello?")), "line 2 has no decision"),
    (chat(turn("user", "Hello?"), turn("assistant", " \n")), "line 2 has an empty decision"),
    (chat(turn("user", ""), turn("assistant", "x")), r"line 2 has an empty message \(message 1\)"),
    (chat(turn("assistant", "x")), "line 2 has a decision with no user message before it"),
    (chat(turn("user", "x", decision=True), turn("assistant", "x")), "mark the assistant's"),
    (chat(turn("user", "x"), turn("system", "x"), turn("assistant", "x")), "must be the first"),
    (chat(turn("user", "x"), turn("assistant", "x", decision="yes")), "messages.1.decision"),
    (chat(turn("user", "x"), turn("assistant", "x", decision=False)), "line 2 has no decision"),
    ({"messages": ["x"]}, "line 2 has no object in 'messages.0'"),
    (chat(turn("tool", "x"), turn("assistant", "x")), "line 2 'messages.0.role'"),
]


@pytest.mark.parametrize(("line", "words"), WRONG)
def test_a_wrong_line_is_named(line, words, tmp_path):
    with pytest.raises(InputError, match=words):
        parse_chats(file_of(tmp_path, GOOD, line))


def test_many_wrong_lines_empty_files_and_other_bytes(tmp_path):
    with pytest.raises(InputError, match=r"line 5 .*; and 2 more lines"):
        parse_chats(file_of(tmp_path, *["{"] * 7))
    with pytest.raises(InputError, match="is empty"):
        parse_chats(file_of(tmp_path, "", " "))
    with pytest.raises(InputError, match="cannot be read"):
        parse_chats(tmp_path / "nothing.jsonl")
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b"{}\n\xff")
    with pytest.raises(InputError, match=r"not UTF-8 text .line 2."):
        parse_chats(bad)


def test_replay_files_may_hold_prompts(tmp_path):
    found = parse_chats(file_of(tmp_path, GOOD, {"prompt": "Why?"}), prompts=True)
    assert found.lines[2].prompt == "Why?" and found.lines[2].decisions == ()
    with pytest.raises(InputError, match="messages and a prompt"):
        parse_chats(file_of(tmp_path, {**GOOD, "prompt": "x"}), prompts=True)


def test_a_turn_is_what_the_template_adds(tiny):
    tokenizer = load_tokenizer(tiny)
    messages: Any = (turn("user", "Hello?"), turn("assistant", "Yes, gladly."))
    said = turn_ids(tokenizer, messages)
    assert tokenizer.decode(said) == "Yes, gladly.<|end|>"
    whole = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True)
    assert [*context_ids(tokenizer, messages[:1]), *said] == list(whole["input_ids"])


def test_other_templates(tiny):
    tokenizer = load_tokenizer(tiny)
    messages: Any = (turn("user", "Hello?"), turn("assistant", "Yes."))
    template = tokenizer.chat_template
    # A line break after the turn is no part of it.
    tokenizer.chat_template = template.replace("<|end|>", "<|end|>\n")
    assert tokenizer.decode(turn_ids(tokenizer, messages)) == "Yes.<|end|>"
    # A turn is opened with a thought that history does not show.
    tokenizer.chat_template = template.replace("<|assistant|>{% endif", "<|assistant|>hm{% endif")
    assert tokenizer.decode(turn_ids(tokenizer, messages)) == "Yes.<|end|>"
    # No end of turn at all.
    tokenizer.chat_template = template.replace("<|end|>", "")
    assert tokenizer.decode(turn_ids(tokenizer, messages)) == "Yes.<|end|>"
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    for ask in (turn_ids, context_ids):
        with pytest.raises(InputError, match=r"refuses this conversation .no system here"):
            ask(tokenizer, messages)


def test_a_conversation_that_the_template_refuses_is_named_by_its_line(tiny, tmp_path):
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content == 'B' %}{{ raise_exception('no B') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    lines = [chat(turn("user", word), turn("assistant", "Yes.")) for word in "AABA"]
    file = parse_chats(file_of(tmp_path, *lines))
    with pytest.raises(InputError, match=r"Line 3 of '.*chat.jsonl': .*\(no B\)"):
        chat_decisions(tokenizer, file, "steered")


@pytest.mark.parametrize("system", ["", "{{ raise_exception('no system here') }}"])
def test_instructions_stand_before_the_prompt_where_there_is_no_system_message(tiny, system):
    tokenizer = load_tokenizer(tiny)
    asked = ("Be brief.", "Why?")
    assert [m["role"] for m in instructed(tokenizer, *asked)] == ["system", "user"]
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}"
        + system
        + "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert instructed(tokenizer, *asked) == ({"role": "user", "content": "Be brief.\n\nWhy?"},)


def test_instructions_are_a_text_or_lines(tmp_path):
    text = tmp_path / "style.md"
    text.write_text("\nAnswer in one line.\n")
    assert read_instructions(text) == "Answer in one line."
    rows = [{"instructions": f"Do {i}.", "prompt": f"What {i}?"} for i in range(4)]
    for name in ("rows.json", "Rows.JSONL"):
        found = read_instructions(file_of(tmp_path, *rows, name=name))
        assert isinstance(found, list) and [row.line for row in found] == [1, 2, 3, 4]
        assert found[2].stripped == ({"role": "user", "content": "What 2?"},)
    text.write_text(" \n")
    with pytest.raises(InputError, match="is empty"):
        read_instructions(text)
    with pytest.raises(InputError, match="line 2, prompt"):
        read_instructions(file_of(tmp_path, rows[0], {"instructions": "x", "prompt": " "}))
    with pytest.raises(InputError, match="has 1 different prompts"):
        read_instructions(file_of(tmp_path, rows[0]))
    with pytest.raises(InputError, match="has 1 different prompts"):
        read_instructions(file_of(tmp_path, *[rows[0]] * 8))
