"""The page without a browser: what it offers, what it escapes, and what it says when things are wrong."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the page's extra is not installed")

import gradio as gr
import torch

from ui import charts, help, markup
from ui.__main__ import main
from ui.app import make_page
from ui.choices import default_dose, listed
from ui.forms import as_number, as_numbers, told
from ui.heat import GROWING
from ui.session import Session
from ui.streaming import Stop, Stops, together
from ui.tabs import verify
from ui.tabs.extract import pairs
from ui.tabs.steer import chat, reload
from ui.tabs.steer import fields as steer_fields
from ui.tabs.train.finer import finer_of
from ui.tabs.train.own_data import _given
from ui.talk import SendStop
from vectors.errors import ContrastSetError, EngineFailed, GrammarError, InputError
from vectors.types import SteeringVector
from workbench.engines.base import LoraReceipt, Receipt, Reply
from workbench.engines.vllm.watchdog import mark
from workbench.runs.record import RunRecord, RunState, read_run, write_json
from workbench.service import Workbench
from workbench.train.config import TrainConfig
from workbench.verify.verify import DOSES

EVIL = "<img src=x onerror=alert(1)>\"'&"
WORKS = ("extract", "verify", "train", "learn", "compare")


@pytest.fixture
def workbench(tmp_path: Path, tiny_folder: Path) -> Iterator[Workbench]:
    with Workbench(tmp_path / "home", str(tiny_folder)) as found:
        yield found


@pytest.fixture
def session(workbench: Workbench) -> Session:
    return Session(workbench, autostart=False)


@pytest.fixture
def page(session: Session) -> Any:
    return make_page(session)


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Any]:
    """A page for the tests that change nothing."""
    with Workbench(tmp_path_factory.mktemp("still") / "home", str(tiny_folder)) as found:
        yield make_page(Session(found, autostart=False))


def handler(page: Any, name: str) -> Any:
    """The function behind an endpoint."""
    return next(f.fn for f in page.fns.values() if f.api_name == name)


def keep_vector(workbench: Workbench, name: str, base: str = "a" * 64) -> str:
    direction = torch.nn.functional.normalize(torch.arange(1.0, 9.0) + len(name), dim=0)
    vector = SteeringVector(base, {1: direction}, {1: 3.0}, 1, {"method": "mean-difference"})
    return workbench.library.save_vector(name, vector).digest


# -- what is offered ----------------------------------------------------------------------------


def test_public_endpoints_are_the_works_and_the_chats(still: Any) -> None:
    named = still.get_api_info()["named_endpoints"]
    chats = {"/steer", "/compare_live"}
    assert set(named) == {f"/{work}" for work in (*WORKS, "search", "bisect")} | chats


def test_tabs_come_in_the_order_of_the_work(still: Any) -> None:
    tabs = [b.label for b in still.blocks.values() if (b.elem_id or "").startswith("tab-")]
    assert tabs == ["Extract", "Steer", "Verify", "Train", "Compare", "Library"]


def test_every_field_is_explained(still: Any) -> None:
    kinds = ("textbox", "slider", "radio", "number")
    fields = [b for b in still.blocks.values() if b.get_block_name() in kinds and b.elem_id]
    unexplained = {
        b.elem_id
        for b in fields
        if not b.info and not b.elem_id.startswith(("library", "compare-live"))
    }
    assert unexplained == set()
    assert all(sentence.endswith(".") for sentence in help.WORDS.values())


def test_every_chart_has_a_table_twin(still: Any) -> None:
    ids = {b.elem_id for b in still.blocks.values()}
    charts_of = {i.removesuffix("-chart") for i in ids if i and i.endswith("-chart")}
    library = {f"library-{part}" for part in ("lineage", "versions", "interference")}
    assert charts_of == {
        "extract",
        "verify",
        "train",
        "learn",
        "runs",
        "search",
        "bisect",
        *library,
    }
    assert {f"{name}-twin" for name in charts_of} <= ids


def test_the_standard_doses_are_those_that_are_measured() -> None:
    assert as_numbers(verify.STANDARD, "dose") == list(DOSES)


def test_the_page_imports_no_engine() -> None:
    code = "import sys, ui.app; print([m for m in ('transformers', 'vllm', 'triton') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# -- what is escaped ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "made",
    [
        markup.alert(EVIL),
        markup.note([EVIL, EVIL]),
        markup.note(EVIL, EVIL),
        markup.lead(EVIL),
        markup.facts({EVIL: EVIL}),
        markup.log_box(EVIL),
        markup.progress("running", 0.5, EVIL, 3, 4, EVIL),
        markup.progress(EVIL, 0.5, EVIL, 3, None),
        markup.status(EVIL, EVIL, EVIL),
        markup.verdict(
            {"passed": False, "reasons": [{"rule": EVIL, "passed": False, "words": EVIL}]}
        ),
        markup.receipt(Reply(EVIL, 1, EVIL, EVIL, Receipt(), 1.0), EVIL),
    ],
)
def test_untrusted_text_is_never_markup(made: str) -> None:
    assert "<img" not in made
    assert "\"'&" not in made
    assert "&lt;img" in made


def test_a_stopped_reply_claims_no_steering_that_was_not_counted() -> None:
    cut = Reply("a", 0, "cancelled", "base", None, 0.1)
    assert "steered" not in markup.receipt(cut, "v=0.2") and "Stopped" in markup.receipt(
        cut, "v=0.2"
    )
    whole = Reply("a", 3, "stop", "base", Receipt(1, 4, 3, 2, 7, 7), 0.1)
    made = markup.receipt(whole, "v=0.2")
    assert "4 prompt and 3 written positions steered, 2 from the cache" in made and "v=0.2" in made
    assert "not steered" in markup.receipt(whole, "")


def test_a_receipt_says_what_a_lora_loses() -> None:
    lora = LoraReceipt("ab" * 32, 16, 0.123, 28, 9)
    made = markup.receipt(Reply("a", 3, "stop", "lora:" + "cd" * 32, None, 0.1, lora), "")
    assert "LoRA of recipe abababababab, rank 16" in made and "12.3% of the change lost" in made


def test_trained_weights_are_swapped_or_used_as_a_lora() -> None:
    def weights(*values: Any) -> dict[str, Any]:
        fields = [None, 0.2, "best", "all", "", *values, "", 0.7, 0, 16, False, True]
        return steer_fields.Settings(*fields).weights

    assert weights(" kind=1 ", "swap", 16) == {"tasks": "kind=1"}
    assert weights("kind=1", "lora", 8.0) == {"tasks": "kind=1", "as_": "lora", "rank": 8}
    assert weights("kind=1", "lora", None) == {"tasks": "kind=1", "as_": "lora", "rank": None}
    assert weights("", "lora", 8) == weights(None, None, None) == {}


def test_chat_text_is_escaped_and_comes_back() -> None:
    said = f"Sure:\n    {EVIL}&lt;\n\treturn\n\n"
    told_to_box = chat.shown([{"role": "user", "content": said}])
    assert "<img" not in told_to_box[0]["content"]["text"]
    assert chat.text_of(told_to_box[0]) == said
    # As the chat box itself has it: nothing is tidied up on the way.
    box = gr.Chatbot()
    (held,) = box.postprocess(told_to_box).root
    assert chat.turns_of(box.preprocess(type(box.postprocess([]))(root=[held]))) == [
        {"role": "user", "content": said}
    ]


def kept_by(text: str) -> dict[str, Any]:
    """What comes back of `text`."""
    return dict(zip(reload.NAMES, reload.restored(text), strict=True))


def test_a_chat_comes_back_with_its_receipts() -> None:
    asked, answered = (
        {"role": r, "content": [{"type": "text", "text": EVIL}]} for r in ("user", "assistant")
    )
    text = json.dumps(
        {"plain": [asked, answered], "plain_receipt": "proof", "steered": [asked],
         "of another version": 1}
    )  # fmt: skip
    found = kept_by(text)
    assert chat.turns_of(found["plain"]) == [
        {"role": r, "content": EVIL} for r in ("user", "assistant")
    ]
    assert "<img" not in found["plain"][0]["content"]
    assert found["plain_receipt"] == "proof" and reload.CUT_OFF in found["steered_receipt"]
    coloured = GROWING + "tokens</div>"
    text = json.dumps({"plain": [asked, answered], "plain_receipt": coloured})
    assert reload.CUT_OFF in kept_by(text)["plain_receipt"]


@pytest.mark.parametrize("text", ["", "no json", "[1]", '{"plain": 3}', '{"plain": [{}]}'])
def test_what_the_browser_kept_is_not_trusted(text: str) -> None:
    found = kept_by(text)
    assert found["plain"] == found["steered"] == [] and found["plain_receipt"] == gr.skip()


def test_progress_never_leaves_its_bar() -> None:
    assert 'aria-valuenow="100"' in markup.progress("running", 7.0, "", 1, None)
    assert 'aria-valuenow="0"' in markup.progress("running", -1.0, "", 1, None)
    assert "about 2 min 5 s left" in markup.progress("running", 0.5, "x", 125, 125.2)


def test_numbers_that_are_none_or_infinite_are_words() -> None:
    for value in (None, float("nan"), float("inf"), "x", True):
        assert markup.number(value) == "none"
    assert markup.number(0.12345) == "0.123"
    assert [markup.size(n) for n in (12, 1200, 3.4e6, 5e9)] == [
        "12 B",
        "1.2 kB",
        "3.4 MB",
        "5.00 GB",
    ]


# -- charts -------------------------------------------------------------------------------------

DOSE = {
    "margin": 1.0, "low": 0.5, "high": 1.5, "change": 1.0, "change_low": 0.5, "change_high": 1.5,
    "kl": 0.1, "kl_p95": 0.3, "repetition": 0.0, "sample": EVIL,
}  # fmt: skip
VERDICT: dict[str, Any] = {
    "vector": "v", "digest": "0" * 64, "passed": True, "working_dose": 0.2, "break_dose": None,
    "base_margin": 0.0, "doses": [{"dose": 0.2, **DOSE}, {"dose": -0.2, **DOSE}],
    "random": [{"seed": 0.0, "change": 0.1}], "random_dose": 0.2, "p_value": 0.5,
    "opposite_change": -1.0, "prompt": {"instruction": EVIL, "margin": 2.0, "change": 2.0},
    "kl_budget": 0.5, "pairs": 30, "seconds": 1.0, "reasons": [],
}  # fmt: skip
BLOCK = {"auroc": 0.9, "pair_accuracy": 0.8, "agreement": 0.5, "cohens_d": 1.0, "norm": 9.0}


@pytest.mark.parametrize(
    "figure",
    [
        charts.separation([], None),
        charts.doses({}),
        charts.doses({"doses": [], "random": []}),
        charts.learning([]),
        charts.learning([{"kind": "other"}]),
    ],
)
def test_empty_charts_say_so(figure: Any) -> None:
    assert figure.layout.annotations[0].text == "No measurements yet"
    assert len(figure.data) == 0


def test_doses_show_the_vector_beside_its_controls() -> None:
    names = {trace.name for trace in charts.doses(VERDICT).data}
    assert {
        "margin",
        "no steering",
        "random directions",
        "asking in the prompt",
        "KL budget",
    } <= names
    assert list(charts.doses(VERDICT).data[1].x) == [-0.2, 0.2]


def test_doses_of_a_run_under_way_need_no_verdict() -> None:
    events = [{"kind": "dose", "dose": 0.1, **DOSE}, {"kind": "random", "seed": 0, "change": 0.2}]
    figure = charts.doses({"doses": events[:1], "random": events[1:]})
    assert "margin" in {trace.name for trace in figure.data}


def test_separation_marks_the_best_block() -> None:
    figure = charts.separation([{"block": 1, **BLOCK}, {"block": 0, **BLOCK}], 1)
    assert list(figure.data[0].x) == [0, 1]
    assert "best block 1" in figure.layout.annotations[0].text


def test_a_short_training_is_marked_by_whole_steps() -> None:
    steps = [{"kind": "step", "step": i, "loss": 1.0, "gradient_norm": 1.0} for i in range(4)]
    layout = charts.learning(steps).layout
    assert layout.xaxis.dtick == layout.xaxis2.dtick == 1


def test_a_long_training_is_thinned_for_the_browser() -> None:
    steps = [{"kind": "step", "step": i, "loss": 1.0, "gradient_norm": 1.0} for i in range(10_000)]
    assert len(charts.learning(steps).data[0].x) <= charts.MOST_POINTS


# -- errors are sentences -----------------------------------------------------------------------


def test_an_error_becomes_its_sentence() -> None:
    def bad() -> None:
        raise InputError(f"No such thing as {EVIL}.")

    box, *rest = told(2)(bad)()
    assert box["visible"] and 'role="alert"' in box["value"] and "<img" not in box["value"]
    assert len(rest) == 2


def test_a_failure_of_ours_shows_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    def bad() -> None:
        raise KeyError("secret")

    (box,) = told(0)(bad)()
    assert "KeyError" in box["value"] and "Traceback" not in box["value"]
    assert "secret" not in box["value"] and "secret" in caplog.text


FINER = ["auto", "off", "both", 256, 6, 10, 0, False, False]


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("extract", ["nothing-there", "", "pca", "last", "model"], "no contrast set"),
        ("extract", ["cheerful", "Bad Name", "pca", "last", "model"], "Bad Name"),
        ("extract", [None, "", "pca", "last", "model"], "Choose a contrast set"),
        ("verify", [None, 19, ""], "Choose a steering vector"),
        ("verify", ["v", 19, "0.1, x"], "must be a number"),
        ("verify", ["v", None, ""], "number of random directions"),
        ("verify", ["nothing-there", 19, ""], "nothing-there"),
        (
            "train",
            [None, "", "", True, "apollo", "soft", 0.25, "1e-4", 8, 1, 8, 0, *FINER],
            "Choose a steering",
        ),
        (
            "train",
            ["v", "", "", True, "apollo", "soft", 0.25, "", 8, 1, 8, 0, *FINER],
            "learning rate",
        ),
        (
            "train",
            ["v", "", "", True, "apollo", "soft", 0.25, "1e-5", 8, None, 8, 0, *FINER],
            "passes",
        ),
        (
            "train",
            ["v", "", "lots", True, "apollo", "soft", 0.25, "1e-5", 8, 1, 8, 0, *FINER],
            "must be a number",
        ),
        (
            "learn",
            [
                "chat",
                "",
                None,
                "",
                "brief",
                "positive",
                "apollo",
                "soft",
                0,
                "1e-4",
                8,
                1,
                8,
                0,
                *FINER,
            ],
            "Choose a file first.",
        ),
        (
            "learn",
            [
                "side",
                "",
                None,
                "",
                None,
                "positive",
                "apollo",
                "soft",
                0,
                "1e-4",
                8,
                1,
                8,
                0,
                *FINER,
            ],
            "Choose a contrast set",
        ),
        (
            "learn",
            [
                "side",
                "",
                None,
                "",
                "brief",
                "negative",
                "apollo",
                "soft",
                0,
                "",
                8,
                1,
                8,
                0,
                *FINER,
            ],
            "Give a learning rate",
        ),
        (
            "train",
            [
                "v",
                "",
                "",
                True,
                "apollo",
                "soft",
                0.25,
                "1e-5",
                8,
                1,
                8,
                0,
                *FINER[:3],
                None,
                *FINER[4:],
            ],
            "Give a number for ",
        ),
        ("compare", ["", "v", None, "", 8, 0, 0], "Choose a trained result"),
        ("compare", ["", None, "t", "", 8, 0, 0], "Choose a steering vector"),
    ],
)
def test_each_start_says_what_is_wrong(
    still: Any, name: str, values: list[Any], words: str
) -> None:
    box = handler(still, name)(*values)[0]
    assert box["visible"] and 'role="alert"' in box["value"]
    assert words in box["value"]


def test_steer_gives_the_message_back_with_the_sentence(still: Any) -> None:
    browser = type("Browser", (), {"session_hash": "x"})()
    fields = ["nobody", 0.2, "best", "all", "", "", "swap", 16, "", 0.7, 0, 16, False, True]
    *_, last = handler(still, "steer")(browser, "Hello", [], [], *fields)
    assert "nobody" in last[0]["value"] and 'role="alert"' in last[0]["value"]
    fields = [None, 0.2, "best", "all", "", "", "swap", 16, "", 0.7, 0, 16, False, True]
    *_, last = handler(still, "steer")(browser, "  ", [], [], *fields)
    assert "empty" in last[0]["value"]


def test_fields_that_were_never_drawn_have_no_value(still: Any) -> None:
    browser = type("Browser", (), {"session_hash": "x"})()
    fields = [None, 0.2, None, "all", None, None, None, None, None, 0.7, 0, 16, False, True]
    *_, last = handler(still, "steer")(browser, None, None, None, *fields)
    assert "empty" in last[0]["value"]


def test_numbers_are_read_or_refused() -> None:
    assert as_numbers("-0.2, .1  3e-1,", "dose") == [-0.2, 0.1, 0.3]
    assert as_numbers(None, "dose") == [] and as_number(" ", "dose") is None
    with pytest.raises(InputError, match="must be a number"):
        as_number("0,2", "dose")


# -- steering terms -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (("v", 0.2, "best", "all", ""), "v=0.2"),
        (("v", -0.2, "", "decode", ""), "v=-0.2/decode"),
        (("v", 0.2, "3", "all", "w=0.1"), "v=0.2:3,w=0.1"),
        (("v", 0.2, " 3 - 5 ", "prompt", ""), "v=0.2:3-5/prompt"),
        (("v", 0.0, "best", "all", ""), ""),
        ((None, 0.2, "best", "all", "w=0.1"), "w=0.1"),
        ((None, 0.2, None, "all", None), ""),
    ],
)
def test_fields_become_the_grammar(fields: tuple[Any, ...], text: str) -> None:
    assert steer_fields.steer_terms(*fields) == text


@pytest.mark.parametrize("block", ["x", "3,w=9", "-1", "5-3", "1.5"])
def test_a_bad_block_is_refused(block: str) -> None:
    with pytest.raises(GrammarError):
        steer_fields.steer_terms("v", 0.2, block, "all", "")


# -- own sets -----------------------------------------------------------------------------------


def test_a_row_of_the_table_is_a_line_of_the_file(workbench: Workbench) -> None:
    rows = [["p", "a", "b"], ["", None, ""], ["q", "same", "same"]]
    with pytest.raises(ContrastSetError, match="line 3 has the same text"):
        workbench.contrast.save("mine", pairs.jsonl_of(rows, "replies"))
    assert json.loads(pairs.jsonl_of([["p", "a", "b"]], "instructions")) == {
        "prompt": "p",
        "positive_instruction": "a",
        "negative_instruction": "b",
    }


def test_a_built_in_set_survives_the_table(workbench: Workbench) -> None:
    found = workbench.contrast.get("cheerful")
    rows = pairs.pairs_table(found)
    assert {row[3] for row in rows} == {"train", "held out"}
    assert sum(row[3] == "held out" for row in rows) == len(found.held_out)
    again = workbench.contrast.save("mine", pairs.jsonl_of(rows, "replies"))
    assert [p.prompt for p in again.pairs] == [p.prompt for p in found.pairs]


@pytest.mark.parametrize(
    ("path", "name"), [("/x/My Set (2).jsonl", "my-set-2"), ("/x/!!.jsonl", "my-set")]
)
def test_a_file_name_becomes_a_name(path: str, name: str) -> None:
    assert pairs.slug(path) == name


# -- the library's choices ----------------------------------------------------------------------


def test_what_was_chosen_stays_chosen(session: Session) -> None:
    keep_vector(session.wb, "one")
    keep_vector(session.wb, "two")
    kinds = ("steering-vector",)
    assert listed(session, "one", *kinds)["value"] == "one"
    assert listed(session, "gone", *kinds)["value"] in ("one", "two")
    assert listed(session, None, "task-vector")["value"] is None


def test_a_vector_of_another_model_gives_way(session: Session) -> None:
    kinds = ("steering-vector",)
    keep_vector(session.wb, "other", base="b" * 64)
    session.base = "a" * 12
    assert listed(session, None, *kinds)["value"] == "other"
    keep_vector(session.wb, "own")
    assert listed(session, "other", *kinds)["value"] == "own"
    assert listed(session, "own", *kinds)["value"] == "own"


def test_verified_vectors_come_first_and_bring_their_dose(session: Session) -> None:
    keep_vector(session.wb, "first")
    digest = keep_vector(session.wb, "two")
    keep_vector(session.wb, "other", base="b" * 64)
    session.base = "a" * 12
    session.wb.library.attest(digest, "verdict", {"passed": True, "working_dose": 0.15})
    update = listed(session, None, "steering-vector", verified_first=True)
    labels = [label for label, _ in update["choices"]]
    assert labels[0] == "two (verified)" and labels[-1] == "other (made for another model)"
    assert default_dose(session, "two") == 0.15
    assert default_dose(session, "first") == default_dose(session, None) == 0.2


# -- runs ---------------------------------------------------------------------------------------


def a_run(workbench: Workbench, kind: str, state: str, result: dict[str, Any] | None = None) -> Any:
    folder = (
        workbench.home.runs
        / f"{kind}-20260101-000000-{len(list(workbench.home.runs.iterdir())):04x}"
    )
    folder.mkdir()
    asked = RunRecord(id=folder.name, kind=kind, parameters={}, asked_at=time.time())
    write_json(folder / "run.json", asked.model_dump())
    now = time.time()
    words = RunState(
        state=state, share=0.4, words=EVIL, started_at=now - 9, ended_at=now, error=EVIL
    )  # type: ignore[arg-type]
    write_json(folder / "state.json", words.model_dump())
    if result is not None:
        write_json(folder / "result.json", result)
    return read_run(folder)


def loads(page: Any, name: str) -> Any:
    """What the page gets as it is loaded, from the panel of a kind of run."""
    found = [f for f in page.fns.values() if getattr(f.fn, "__name__", "") == "_attach"]
    return next(f.fn for f in found if f.fn.__self__.kind == name)


@pytest.mark.parametrize("kind", WORKS)
def test_a_page_without_runs_loads(still: Any, kind: str) -> None:
    assert loads(still, kind)()[0] == ""


@pytest.mark.parametrize("kind", WORKS)
@pytest.mark.parametrize("state", ["failed", "cancelled", "done"])
def test_a_page_finds_its_last_run(page: Any, session: Session, kind: str, state: str) -> None:
    view = a_run(session.wb, kind, state, {"odd": 1} if state == "done" else None)
    run_id, _mark, bar, *_ = loads(page, kind)()
    assert run_id == view.id
    assert f'data-state="{state}"' in bar["value"] and "<img" not in bar["value"]


def test_the_result_of_a_verification_is_drawn(page: Any, session: Session) -> None:
    a_run(session.wb, "verify", "done", VERDICT)
    values = loads(page, "verify")()
    box, result, chart, _summary, samples, *_ = values[-7:]
    assert "Passed" in box["value"] and result["visible"]
    assert len(chart.data) > 5 and samples[0] == ["-0.2", "0%", EVIL]


def test_the_result_of_learning_is_drawn(page: Any, session: Session) -> None:
    found = {
        "name": "sea", "revision": 2, "digest": "ab" * 32, "seconds": 3.0, "optimizer": "apollo",
        "decisions": 9, "changed_share": 0.1, "times": {}, "recovered": 0.75,
        "log_prob": {"base": -3.0, "instructed": -1.0, "trained": -1.5}, "margin": {},
        "kl": {"trained": 0.02},
    }  # fmt: skip
    view = a_run(session.wb, "learn", "done", found)
    stripped = {
        "kind": "stripped",
        "tokens": 9,
        "left": 4,
        "with_instructions": EVIL,
        "stripped": "b",
    }
    (view.folder / "events.jsonl").write_text(json.dumps(stripped) + "\n")
    room, text, _now, result, sentence, table, *_ = loads(page, "learn")()[-11:]
    assert room["visible"] and "&lt;img" in text and "<img" not in text
    assert result["visible"] and "+1.500 nats likelier" in sentence and "75%" in sentence
    assert [row[0].split()[0] for row in table] == ["log-probability", "KL"]
    found |= {"log_prob": {}, "recovered": None}
    write_json(view.folder / "result.json", found)
    assert "nothing was measured" in loads(page, "learn")()[-7]


def test_a_file_stands_in_for_text_that_was_left(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "style.md"
    path.write_text("From the file.")
    for given, wanted in ((str(path), "From the file."), (None, "Left over.")):
        kept, usual = _given(session, "instructions", given, "Left over.", None, "positive")
        assert Path(kept["instructions"]).read_text() == wanted and usual == "instructions-learnt"


def test_finer_settings_become_parameters() -> None:
    found = finer_of("2", "host", "last", 64, 8.0, 5, 3, True, False)
    assert found["tier"] == 2 and found["batch"] == 8 and found["recompute"] is True
    assert TrainConfig.parse(found).keep == "last"
    assert TrainConfig.parse(finer_of(*FINER)) == TrainConfig()


def test_a_training_under_way_shows_memory_and_stale_contexts(page: Any, session: Session) -> None:
    view = a_run(session.wb, "train", "cancelled")
    events = [
        {"kind": "step", "step": n, "steps": 9, "loss": 1.0, "memory": 2_500_000_000}
        for n in (1, 2)
    ] + [
        {"kind": "contexts", "step": 1, "read": 4, "reused": 0, "refreshed": 0, "staleness": None,
         "interval": 16},
        {"kind": "contexts", "step": 2, "read": 0, "reused": 3, "refreshed": 1, "staleness": 0.0123,
         "interval": 8},
        {"kind": "held_out", "step": 2, "loss": 1.0, "general": 2.0, "changed_share": 0.25},
    ]  # fmt: skip
    (view.folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    now, *_, held_out = loads(page, "train")()[-9:]
    assert "2.50 GB" in now and "4 read, 3 reused, 1 refreshed" in now
    assert "1.2% at the last refresh; due after 8 steps" in now
    assert held_out == [["2", "1", "2", "25%"]]


def test_data_is_kept_for_a_run_to_read_again(session: Session) -> None:
    one = session.wb.keep_data(b"Answer briefly.", ".txt")
    assert one == session.wb.keep_data(b"Answer briefly.", ".txt")
    assert one.read_bytes() == b"Answer briefly." and one.is_relative_to(session.wb.home.library)
    assert session.wb.library.fsck().faults == []
    with pytest.raises(InputError, match="The file's ending is"):
        session.wb.keep_data(b"", ".pkl")


def test_measured_needs_no_result(session: Session) -> None:
    view = a_run(session.wb, "verify", "cancelled")
    assert verify.measured(view) == {"doses": [], "random": []}


# -- engine -------------------------------------------------------------------------------------


def test_a_model_that_is_not_there_fails_in_words(session: Session) -> None:
    session.wb.use_model("no-such-model")
    session.start_engine()
    for _ in range(200):
        if not session.starting:
            break
        time.sleep(0.05)
    status = session.engine_status()
    assert status.state == "failed" and "no-such-model" in status.error


def test_an_engine_that_a_run_may_need_is_not_stopped(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workbench, "owns_engine", True)
    view = a_run(session.wb, "train", "running")
    path = view.folder / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "process": mark(), "ended_at": 0}))
    assert not read_run(view.folder).ended
    for act in (session.stop_engine, lambda: session.use_model("another")):
        with pytest.raises(EngineFailed, match=f"The run {view.id} may need the engine"):
            act()
    # An engine that somebody else started does not stop with this page.
    monkeypatch.setattr(Workbench, "owns_engine", False)
    session.stop_engine()


def test_a_page_hears_of_a_model_that_another_tab_has_chosen(session: Session) -> None:
    page = make_page(session)
    draw = next(f.fn for f in page.fns.values() if getattr(f.fn, "__name__", "") == "draw")
    *_, update, known = draw("")
    assert update["value"] == known == session.wb.model_name
    *_, update, known = draw(known)
    assert "value" not in update, "what is typed at the moment is left alone"
    session.wb.use_model("another")
    *_, update, known = draw(known)
    assert update["value"] == known == "another" and ("another", "another") in update["choices"]


def test_an_empty_model_is_refused(session: Session) -> None:
    with pytest.raises(InputError, match="Name a model"):
        session.use_model(" ")


class Speaker:
    """Something to stream from: two words, or an error."""

    def stream(self, request: str, cancel: Any) -> Iterator[Any]:
        if request == "bad":
            raise EngineFailed("The engine died.")
        yield from ("one ", "two ")
        while request == "long" and not cancel():
            time.sleep(0.01)
        yield Reply("one two", 2, "stop", "base", None, 0.1)


def test_streams_side_by_side_end_apart() -> None:
    requests = {"a": "good", "b": "bad"}
    *_, parts = together(Speaker(), requests, Stop())  # type: ignore[arg-type]
    assert parts["a"].reply.tokens == 2 and parts["a"].text == "one two"
    assert parts["b"].error == "The engine died."


def test_a_stopped_stream_keeps_what_came() -> None:
    stop = Stop()
    for parts in together(Speaker(), {"a": "long"}, stop):  # type: ignore[arg-type]
        if parts["a"].text:
            stop.set()
    assert parts["a"].text.startswith("one")


def test_a_forgotten_stream_shows_nothing_more() -> None:
    stop = Stop()
    stream = together(Speaker(), {"a": "long"}, stop)  # type: ignore[arg-type]
    next(stream)
    stop.forget = True
    stop.set()
    assert list(stream) == []


def test_a_stream_that_nobody_reads_is_stopped() -> None:
    stop = Stop()
    stream = together(Speaker(), {"a": "long"}, stop)  # type: ignore[arg-type]
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert stop.is_set()


def test_each_place_of_a_browser_has_one_stream() -> None:
    stops = Stops()
    first, other, foreign = stops.new("x", "steer"), stops.new("x", "live"), stops.new("y", "steer")
    second = stops.new("x", "steer")
    assert first.is_set() and first.forget and not second.is_set()
    stops.end("x", "steer")
    assert second.is_set() and not second.forget
    stops.end_all("x")
    assert other.is_set() and not foreign.is_set()


# -- start of the process -----------------------------------------------------------------------


def test_a_port_in_use_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["--port", str(port)]) == 3
    said = capsys.readouterr().err
    assert str(port) in said and said.count("\n") == 1


def test_a_home_that_cannot_be_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert main(["--port", "0", "--home", str(file / "home")]) == 3
    assert "cannot be written" in capsys.readouterr().err


def test_what_fails_while_replies_are_prepared_is_told_and_gives_send_back() -> None:
    def ask(stop: Any) -> Iterator[tuple[Any, ...]]:
        yield ("busy", "so far")
        raise MemoryError("no room")

    stops = SimpleNamespace(new=lambda browser, place: SimpleNamespace(forget=False))
    buttons = SendStop(SimpleNamespace(stops=stops), "here", None, None)  # type: ignore[arg-type]
    rows = list(buttons._run(ask, 2)(SimpleNamespace(session_hash="x")))
    assert rows[0][:2] == ("busy", "so far") and rows[0][2]["interactive"] is False
    assert "The page failed at this (MemoryError)" in str(rows[1][0])
    assert rows[1][2]["interactive"] is True and rows[1][3]["visible"] is False
