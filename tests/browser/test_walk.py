"""The whole page in a real browser, on the tiny model and a real engine: every tab, in order.

The tests share one page and build on one another, as a person's work does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests_support.browser import (
    ENGINE,
    REPLY,
    RUN,
    begin,
    ended,
    expect,
    fill,
    go,
    number,
    says,
    unfold,
    value,
)

pytest.importorskip("gradio", reason="the page's extra is not installed")
pytest.importorskip("vllm", reason="vLLM is not installed on this machine")
pytest.importorskip("playwright", reason="playwright is not installed")

pytestmark = [pytest.mark.browser, pytest.mark.engine]


@pytest.fixture(scope="module")
def dialogs() -> list[str]:
    """What the page's scripts said aloud; nothing ever should."""
    return []


@pytest.fixture(scope="module")
def page(chromium: Any, tiny_url: str, dialogs: list[str]) -> Iterator[Any]:
    """One page for all tests of this file."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    found = context.new_page()
    found.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    found.goto(tiny_url)
    yield found
    context.close()


def choose(page: Any, elem_id: str, entry: str) -> None:
    """Choose from a list."""
    page.locator(f"#{elem_id} input").click()
    page.get_by_role("option", name=entry, exact=True).click()
    page.keyboard.press("Escape")


def test_engine_starts_with_the_page(page: Any) -> None:
    chip = page.locator("#engine-status .wb-chip")
    expect(chip).to_have_text(re.compile("Engine (starting|ready)"))
    assert value(page, "model").startswith("tiny")


def test_a_broken_file_is_told_by_its_line(page: Any, tmp_path: Path) -> None:
    go(page, "Extract")
    says(page, "extract-counts", "held out")
    unfold(page, "set-own")
    broken = tmp_path / "broken.jsonl"
    good = json.dumps({"prompt": "a", "positive": "b", "negative": "c"})
    broken.write_text(f"{good}\n{{not json\n")
    page.set_input_files("#set-file input[type=file]", broken)
    says(page, "set-notice", "line 2 is not a JSON object")
    expect(page.locator("#set-notice [role=alert]")).to_be_visible()


def test_an_own_set_is_kept(page: Any) -> None:
    go(page, "Extract")
    page.get_by_role("tab", name="Write pairs").click()
    page.click("#set-copy")
    expect(page.locator("#set-editor")).to_contain_text("rainy Sunday")
    fill(page, "set-name", "my-own")
    page.click("#set-keep-rows")
    says(page, "set-notice", "Kept as 'my-own'")
    expect(page.locator("#extract-set input")).to_have_value("my-own")


def test_extract(page: Any) -> None:
    go(page, "Extract")
    fill(page, "extract-name", "sunny")
    begin(page, "extract")
    ended(page, "extract")
    says(page, "extract-sentence", "'sunny' revision")
    expect(page.locator("#extract-chart .main-svg").first).to_be_visible()
    unfold(page, "extract-twin")
    expect(page.locator("#extract-blocks")).to_contain_text("AUROC")


def test_a_bad_name_is_a_sentence(page: Any) -> None:
    go(page, "Extract")
    fill(page, "extract-name", "<img src=x onerror=alert(1)>")
    page.click("#extract-run")
    says(page, "extract-notice", "name")
    expect(page.locator("#extract-notice [role=alert]")).to_be_visible()
    assert page.locator("#extract-notice img").count() == 0
    fill(page, "extract-name", "sunny")


def test_steer_side_by_side(page: Any) -> None:
    go(page, "Steer")
    expect(page.locator("#steer-vector input")).to_have_value(re.compile("sunny"))
    unfold(page, "steer-writing")
    number(page, "steer-tokens", 12)
    fill(page, "steer-prompt", "How was your <b>day</b>?")
    page.click("#steer-send")
    expect(page.locator("#steer-receipt")).to_contain_text("positions steered", timeout=ENGINE)
    expect(page.locator("#steer-plain-receipt")).to_contain_text("not steered")
    for column in ("plain", "steered"):
        chat = page.locator(f"#steer-{column}")
        expect(chat).to_contain_text("How was your <b>day</b>?")
        assert chat.locator("[data-testid=bot]").count() == 1
    unfold(page, "steer-code")
    page.click("#steer-as-code")
    expect(page.locator("#steer-curl")).to_contain_text("curl")


def test_a_second_turn_and_a_retry(page: Any) -> None:
    go(page, "Steer")
    fill(page, "steer-prompt", "And tomorrow?")
    page.click("#steer-send")
    expect(page.locator("#steer-steered [data-testid=bot]")).to_have_count(2)
    expect(page.locator("#steer-send")).to_be_enabled()
    page.click("#steer-retry")
    page.wait_for_timeout(1000)
    expect(page.locator("#steer-send")).to_be_enabled()
    expect(page.locator("#steer-receipt")).to_contain_text("positions steered")
    expect(page.locator("#steer-steered [data-testid=bot]")).to_have_count(2)
    page.click("#steer-clear")
    expect(page.locator("#steer-steered [data-testid=bot]")).to_have_count(0)


def test_tokens_are_coloured_by_the_vector(page: Any) -> None:
    go(page, "Steer")
    page.locator("#steer-colour input").check()
    fill(page, "steer-prompt", "Which word is it?")
    page.click("#steer-send")
    for place in ("steer-plain-receipt", "steer-receipt"):
        coloured = page.locator(f"#{place} .wb-heat span[style]")
        # Nothing reads the last of the 12.
        expect(coloured).to_have_count(11, timeout=REPLY)
        expect(page.locator(f"#{place}")).to_contain_text("away from sunny")


WATCH = """() => {
  window.painted = [];
  window.changed = [];
  const look = (into) => {
    const busy = document.querySelector("#steer-stop")?.checkVisibility() ?? false;
    const known = document.querySelectorAll("#steer-receipt .wb-heat span[style]").length;
    if (busy) into.push(known);
  };
  const paint = () => { look(window.painted); window.looking = requestAnimationFrame(paint); };
  paint();
  // A browser that other work keeps waiting paints few of the pictures that it gets.
  window.watching = new MutationObserver(() => look(window.changed));
  window.watching.observe(document.querySelector("#steer-receipt"), { childList: true, subtree: true });
}"""
SEEN = """() => {
  cancelAnimationFrame(window.looking);
  window.watching.disconnect();
  return [window.painted, window.changed];
}"""


def test_tokens_are_coloured_while_they_are_written(page: Any) -> None:
    go(page, "Steer")
    number(page, "steer-tokens", 1000)
    try:
        # A scheduler may keep the browser waiting for a whole reply of so small a model; it is asked again.
        grown = any(len(coloured_on_the_way(page)) > 1 for _ in range(5))
    finally:
        number(page, "steer-tokens", 12)
        page.locator("#steer-colour input").uncheck()
    assert grown, "nothing was coloured before the end"
    assert page.locator("#steer-receipt [data-growing]").count() == 0


def coloured_on_the_way(page: Any) -> set[int]:
    """How many tokens were coloured at times while a reply was written."""
    page.click("#steer-clear")
    expect(page.locator("#steer-receipt .wb-heat")).to_have_count(0)
    fill(page, "steer-prompt", "Write until I say <b>when</b>.")
    page.evaluate(WATCH)
    page.click("#steer-send")
    expect(page.locator("#steer-receipt")).to_contain_text("positions steered")
    expect(page.locator("#steer-receipt .wb-heat span[style]")).to_have_count(999)
    expect(page.locator("#steer-send")).to_be_enabled()
    painted, changed = page.evaluate(SEEN)
    assert painted == sorted(painted), "colours that were there went away for a moment"
    return {known for known in [*painted, *changed] if 0 < known < 999}


def test_the_chat_survives_a_reload(page: Any) -> None:
    go(page, "Steer")
    page.click("#steer-clear")
    fill(page, "steer-prompt", "Does this <i>stay</i>?")
    page.click("#steer-send")
    receipt = page.locator("#steer-receipt")
    expect(receipt).to_contain_text("positions steered")
    proof, reply = (
        receipt.inner_text(),
        page.locator("#steer-steered [data-testid=bot]").inner_text(),
    )
    number(page, "steer-dose", 0.31)
    fill(page, "steer-prompt", "not sent yet")
    page.reload()
    go(page, "Steer")
    expect(page.locator("#steer-steered")).to_contain_text("Does this <i>stay</i>?")
    expect(page.locator("#steer-plain [data-testid=bot]")).to_have_count(1)
    assert page.locator("#steer-steered [data-testid=bot]").inner_text() == reply
    assert receipt.inner_text() == proof
    assert value(page, "steer-prompt") == "not sent yet"
    expect(page.locator("#steer-dose input[type=number]")).to_have_value("0.31")
    unfold(page, "steer-writing")
    expect(page.locator("#steer-tokens input[type=number]")).to_have_value("12")
    # The chat that came back goes on.
    page.click("#steer-send")
    expect(page.locator("#steer-steered [data-testid=bot]")).to_have_count(2)
    expect(page.locator("#steer-send")).to_be_enabled()


def test_another_tab_has_a_chat_of_its_own(page: Any, tiny_url: str) -> None:
    other = page.context.new_page()
    other.goto(tiny_url)
    go(other, "Steer")
    expect(other.locator("#steer-vector input")).to_have_value(re.compile("sunny"))
    expect(other.locator("#steer-steered [data-testid=user]")).to_have_count(0)
    fill(other, "steer-prompt", "Only here.")
    other.click("#steer-send")
    expect(other.locator("#steer-steered")).to_contain_text("Only here.")
    other.close()
    page.reload()
    go(page, "Steer")
    expect(page.locator("#steer-steered [data-testid=bot]")).to_have_count(2)
    expect(page.locator("#steer-steered")).not_to_contain_text("Only here.")


def test_a_cleared_chat_stays_cleared(page: Any) -> None:
    go(page, "Steer")
    page.click("#steer-clear")
    expect(page.locator("#steer-steered [data-testid=bot]")).to_have_count(0)
    page.reload()
    go(page, "Steer")
    expect(page.locator("#steer-vector input")).to_have_value(re.compile("sunny"))
    expect(page.locator("#steer-steered [data-testid=user]")).to_have_count(0)
    assert page.locator("#steer-receipt").inner_text().strip() == ""
    unfold(page, "steer-writing")


def test_stop_keeps_what_came(page: Any) -> None:
    go(page, "Steer")
    number(page, "steer-tokens", 1024)
    try:
        # As above, a whole reply may pass before the browser gets its turn.
        assert any(stopped(page) for _ in range(5)), "the reply always came to its end"
    finally:
        number(page, "steer-tokens", 12)


def stopped(page: Any) -> bool:
    """Whether the button ended a reply in time."""
    page.click("#steer-clear")
    expect(page.locator("#steer-receipt")).not_to_contain_text(re.compile("steered|Stopped"))
    fill(page, "steer-prompt", "Tell me everything.")
    # The tiny model is quick, so the button is pressed as soon as it is there.
    page.evaluate(
        """() => { const timer = setInterval(() => {
            const stop = document.querySelector("#steer-stop");
            if (stop) { stop.click(); clearInterval(timer); }
        }, 20); }"""
    )
    page.click("#steer-send")
    receipt = page.locator("#steer-receipt")
    expect(receipt).to_contain_text(re.compile("Stopped|positions steered"))
    expect(page.locator("#steer-send")).to_be_enabled()
    return "Stopped" in receipt.inner_text()


def test_a_wrong_term_is_a_sentence(page: Any) -> None:
    go(page, "Steer")
    unfold(page, "steer-where")
    fill(page, "steer-further", "nobody=0.1")
    fill(page, "steer-prompt", "Hello")
    page.click("#steer-send")
    says(page, "steer-notice", "nobody")
    assert value(page, "steer-prompt") == "Hello"
    fill(page, "steer-further", "")


def test_verify_survives_a_reload(page: Any) -> None:
    go(page, "Verify")
    expect(page.locator("#verify-vector input")).to_have_value(re.compile("sunny"))
    fill(page, "verify-doses", "0.1, 0.2")
    fill(page, "verify-controls", "1")
    page.click("#verify-run")
    bar = page.locator("#verify-progress .wb-progress")
    expect(bar).to_have_attribute("data-state", "running")
    page.reload()
    go(page, "Verify")
    expect(bar).to_be_visible()
    ended(page, "verify")
    # One random direction is too few to pass, which is the truth about one.
    expect(page.locator("#verify-verdict [data-passed=false]")).to_be_visible()
    expect(page.locator("#verify-chart .main-svg").first).to_be_visible()
    unfold(page, "verify-twin")
    expect(page.locator("#verify-doses-table")).to_contain_text("+0.1")


def test_forms_survive_a_reload(page: Any, tiny_url: str) -> None:
    typed = {
        "extract-name": "rainy",
        "verify-doses": "0.1, 0.3",
        "train-name": "not-yet",
        "compare-prompts": "Only this?\nAnd this.",
        "compare-live-prompt": "Not sent yet.",
    }
    for elem_id, text in typed.items():
        go(page, elem_id.split("-")[0].capitalize())
        fill(page, elem_id, text)
    unfold(page, "compare-writing")
    number(page, "compare-tokens", 9)
    was = value(page, "extract-set")
    assert was == "my-own"
    other = page.context.new_page()
    other.goto(tiny_url)
    page.reload()
    for elem_id, text in typed.items():
        go(page, elem_id.split("-")[0].capitalize())
        expect(page.locator(f"#{elem_id}").locator("textarea, input").first).to_have_value(text)
    unfold(page, "compare-writing")
    expect(page.locator("#compare-tokens input[type=number]")).to_have_value("9")
    unfold(page, "compare-writing")
    assert value(page, "extract-set") == was
    # Another tab of the browser has forms of its own, so that what came back came from this one.
    go(other, "Verify")
    expect(other.locator("#verify-vector input")).to_have_value(re.compile("sunny"))
    assert value(other, "verify-doses") == ""
    other.close()
    go(page, "Extract")
    fill(page, "extract-name", "sunny")
    go(page, "Train")
    fill(page, "train-name", "")


def test_a_run_is_cancelled(page: Any) -> None:
    go(page, "Verify")
    fill(page, "verify-doses", "0.05, 0.15, 0.25, 0.3, 0.35")
    fill(page, "verify-controls", "60")
    page.click("#verify-run")
    bar = page.locator("#verify-progress .wb-progress")
    expect(bar).to_have_attribute("data-state", "running")
    page.click("#verify-cancel")
    ended(page, "verify", "cancelled")


def test_train(page: Any) -> None:
    go(page, "Train")
    says(page, "train-notice", "did not pass")
    unfold(page, "train-settings")
    for field, count in (("prompts", "8"), ("tokens", "6")):
        fill(page, f"train-{field}", count)
    unfold(page, "train-finer")
    fill(page, "train-rank", "16")
    begin(page, "train")
    ended(page, "train")
    says(page, "train-sentence", "recover")
    expect(page.locator("#train-margins")).to_contain_text("margin")
    expect(page.locator("#train-now")).to_contain_text("memory")
    expect(page.locator("#train-chart .main-svg").first).to_be_visible()


def test_instructions_are_learnt_and_stripped(page: Any) -> None:
    go(page, "Train")
    unfold(page, "learn")
    page.click("#learn-run")
    says(page, "learn-notice", "Choose a file first")
    page.locator("#learn-source").get_by_text("instructions, stripped").click()
    fill(page, "learn-text", "Always answer with the word <b>sunshine</b>.")
    fill(page, "learn-name", "sunshine-learnt")
    unfold(page, "learn-settings")
    for field, count in (("prompts", "8"), ("tokens", "6")):
        fill(page, f"learn-{field}", count)
    begin(page, "learn")
    ended(page, "learn")
    says(page, "learn-sentence", "of what the instructions do where they are read")
    expect(page.locator("#learn-margins")).to_contain_text("log-probability")
    unfold(page, "learn-stripped")
    expect(page.locator("#learn-stripped")).to_contain_text("word <b>sunshine</b>")
    expect(page.locator("#learn-chart .main-svg").first).to_be_visible()


def test_compare(page: Any) -> None:
    go(page, "Compare")
    # The newest is offered first.
    expect(page.locator("#compare-task input")).to_have_value(re.compile("sunshine-learnt"))
    choose(page, "compare-task", "sunny-baked")
    unfold(page, "compare-writing")
    number(page, "compare-tokens", 8)
    fill(page, "compare-prompts", "How was your day?\nWhat is for dinner?")
    begin(page, "compare")
    ended(page, "compare")
    expect(page.locator("#compare-rows")).to_contain_text("What is for dinner?")
    expect(page.locator("#compare-margins")).to_contain_text("weights")
    fill(page, "compare-live-prompt", "Hello there")
    page.click("#compare-live-send")
    receipt = page.locator("#compare-live-trained-receipt")
    expect(receipt).to_contain_text("weights", timeout=RUN)
    assert "weights base" not in receipt.inner_text()
    expect(page.locator("#compare-live-steered-receipt")).to_contain_text("positions steered")


def pick(page: Any, name: str) -> None:
    """Click an entry's row in the library's table, which keeps a hidden copy to measure by."""
    cells = page.locator("#library-table").get_by_text(name, exact=True)
    cells.filter(visible=True).first.click()


def test_library(page: Any) -> None:
    go(page, "Library")
    expect(page.locator("#library-table")).to_contain_text("sunny-baked")
    pick(page, "sunny")
    says(page, "library-summary", "sunny (revision")
    with page.expect_download() as download:
        page.click("#library-download")
    assert download.value.suggested_filename == "sunny.safetensors"
    expect(page.locator("#runs-table")).to_contain_text("cancelled")


def test_lineage_and_versions(page: Any) -> None:
    go(page, "Library")
    pick(page, "sunny-baked")
    says(page, "library-summary", "sunny-baked (revision")
    unfold(page, "library-lineage")
    expect(page.locator("#library-lineage-chart .main-svg").first).to_be_visible()
    expect(page.locator("#library-lineage-chart")).to_contain_text("made of")
    unfold(page, "library-lineage-twin")
    expect(page.locator("#library-lineage-table")).to_contain_text("made by train-")
    unfold(page, "library-versions")
    choose(page, "library-old", "sunny")
    page.click("#library-compare")
    says(page, "library-versions-notice", "One is a steering-vector, the other a task-vector")
    expect(page.locator("#library-versions-chart .main-svg").first).to_be_visible()


def test_a_recipe_by_sliders(page: Any) -> None:
    go(page, "Library")
    unfold(page, "library-recipes")
    page.click("#library-combine")
    says(page, "library-notice", "Choose task vectors first")
    choose(page, "library-ingredients", "sunny-baked")
    expect(page.locator("#library-weight-0")).to_contain_text("sunny-baked")
    number(page, "library-weight-0", 0.5)
    choose(page, "library-method", "dare")
    unfold(page, "library-options")
    expect(page.locator("#library-options")).to_contain_text("Probability that an element is kept")
    page.get_by_label("density").fill("0.7")
    fill(page, "library-recipe-name", "half-sunny")
    page.click("#library-combine")
    says(page, "library-notice", "Kept 'half-sunny' revision 1: sunny-baked=0.5, by dare")
    expect(page.locator("#library-entry input")).to_have_value("half-sunny")
    expect(page.locator("#library-lineage-table")).to_contain_text("sunny-baked@1 x 0.5")
    choose(page, "library-method", "linear")
    page.click("#library-edit")
    expect(page.locator("#library-method input")).to_have_value("dare")
    expect(page.get_by_label("density")).to_have_value("0.7")
    unfold(page, "library-meeting")
    page.click("#library-interference")
    says(page, "library-interference-notice", "choose at least two")


def test_interference_is_seen_before_a_merge(page: Any, tiny_workbench: Any) -> None:
    go(page, "Library")
    library, model = tiny_workbench.library, tiny_workbench.model()
    keep_opposite(library, model)
    page.click("#library-refresh")
    expect(page.locator("#library-table")).to_contain_text("other-way")
    choose(page, "library-ingredients", "other-way")
    expect(page.locator("#library-weight-1")).to_contain_text("other-way")
    page.click("#library-interference")
    says(page, "library-interference-notice", "get on worst")
    expect(page.locator("#library-interference-chart .main-svg").first).to_be_visible()


def keep_opposite(library: Any, model: Any) -> None:
    """Keep a task vector that moves one tensor."""
    from safetensors.torch import load_file

    weights = {k: x for f in model.folder.glob("*.safetensors") for k, x in load_file(f).items()}
    place = next(name for name in sorted(weights) if "down_proj" in name)
    before = {place: weights[place]}
    library.save_task("other-way", model.base, before, {place: -weights[place]})


def test_a_search_survives_a_reload_and_its_best_is_kept(page: Any) -> None:
    go(page, "Library")
    unfold(page, "library-search")
    recipe = page.locator("#search-recipe")
    # What was the newest when the tab was first opened.
    expect(recipe).to_contain_text("sunshine-learnt")
    choose(page, "search-recipe", "other-way")
    expect(recipe).to_contain_text("other-way")
    unfold(page, "search-settings")
    fill(page, "search-pairs", "4")
    fill(page, "search-budget", "100")
    fill(page, "search-coefficients", "1, <b>x</b>")
    page.click("#search-run")
    says(page, "search-notice", "The coefficient must be a number, not '<b>x</b>'")
    # Of two small steps to either side one is uphill.
    fill(page, "search-coefficients", "-0.1, 0.1")
    page.click("#search-run")
    bar = page.locator("#search-progress .wb-progress")
    expect(bar).to_have_attribute("data-state", "running")
    expect(page.locator("#search-cancel")).to_be_enabled()
    page.reload()
    go(page, "Library")
    unfold(page, "library-search")
    expect(bar).to_be_visible()
    expect(page.locator("#search-coefficients textarea")).to_have_value("-0.1, 0.1")
    for name in ("sunshine-learnt", "other-way"):
        expect(recipe).to_contain_text(name)
    ended(page, "search")
    says(page, "search-sentence", "is the best: on the held-out pairs that did not choose it")
    expect(page.locator("#search-chart .main-svg").first).to_be_visible()
    expect(page.locator("#search-chart")).to_contain_text("best")
    unfold(page, "search-twin")
    expect(page.locator("#search-points")).to_contain_text("the base")
    fill(page, "search-name", "gentle")
    page.click("#search-keep")
    says(page, "search-kept", "Kept 'gentle' revision 1: ")
    expect(page.locator("#library-table")).to_contain_text("gentle")


def test_a_bisection(page: Any) -> None:
    unfold(page, "library-bisect")
    expect(page.locator("#bisect-good input")).to_have_value("the base")
    choose(page, "bisect-bad", "other-way")
    expect(page.locator("#bisect-bad input")).to_have_value("other-way")
    choose(page, "bisect-behaviour", "loss on general text")
    fill(page, "bisect-threshold", "half")
    page.click("#bisect-run")
    says(page, "bisect-notice", "The threshold must be a number, not 'half'")
    fill(page, "bisect-threshold", "")
    page.click("#bisect-run")
    ended(page, "bisect")
    says(page, "bisect-sentence", "'other-way' changed it")
    expect(page.locator("#bisect-chart .main-svg").first).to_be_visible()


def test_rename_delete_restore_undo(page: Any) -> None:
    go(page, "Library")
    pick(page, "half-sunny")
    expect(page.locator("#library-entry input")).to_have_value("half-sunny")
    unfold(page, "library-acts")
    fill(page, "library-new-name", "mild")
    page.click("#library-rename")
    says(page, "library-notice", "is now called 'mild'")
    expect(page.locator("#library-entry input")).to_have_value("mild")
    page.click("#library-delete")
    says(page, "library-notice", "Delete 'mild'?")
    pick(page, "sunny")
    expect(page.locator("#library-entry input")).to_have_value("sunny")
    # What was asked about goes, and not what was chosen since.
    page.click("#library-delete-yes")
    says(page, "library-notice", "'mild' is deleted")
    expect(page.locator("#library-table")).to_contain_text("sunny")
    expect(page.locator("#library-table")).not_to_contain_text("mild")
    page.click("#library-restore")
    says(page, "library-notice", "'mild' is back")
    expect(page.locator("#library-table")).to_contain_text("mild")
    for words, there in (("restore 'mild'", False), ("delete 'mild'", True)):
        undo = page.locator("#library-undo")
        expect(undo).to_contain_text(f"Undo: {words}")
        undo.click()
        says(page, "library-notice", f"Taken back: {words}")
        table = expect(page.locator("#library-table"))
        (table.to_contain_text if there else table.not_to_contain_text)("mild")
    expect(page.locator("#library-undo")).to_contain_text("Undo: rename 'half-sunny' (to mild)")


def test_nothing_ran_as_script(dialogs: list[str]) -> None:
    assert dialogs == []
