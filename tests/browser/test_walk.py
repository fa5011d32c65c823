"""The whole page in a real browser, on the tiny model and a real engine: every tab, in order.

The tests share one page and build on one another, as a person's work does. With SCREENSHOTS set to
a folder, each tab leaves a picture there.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the page's extra is not installed")
pytest.importorskip("vllm", reason="vLLM is not installed on this machine")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect: Any = sync_api.expect

pytestmark = [pytest.mark.browser, pytest.mark.engine]

ENGINE, RUN, REPLY = 240_000, 180_000, 60_000
"""Milliseconds: an engine's start, a run, a reply, on two cores that also do other work."""


@pytest.fixture(scope="module")
def url(tiny_home: Path) -> Iterator[str]:
    """The page as a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ui", "--model", "tiny", "--home", str(tiny_home)]
    process = subprocess.Popen([*command, "--port", str(port)])
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(address, timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, "the page ended at its start"
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module")
def dialogs() -> list[str]:
    """What the page's scripts said aloud; nothing ever should."""
    return []


@pytest.fixture(scope="module")
def page(chromium: Any, url: str, dialogs: list[str]) -> Iterator[Any]:
    """One page for all tests of this file."""
    context = chromium.new_context(viewport={"width": 1366, "height": 900})
    found = context.new_page()
    found.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    found.goto(url)
    yield found
    context.close()


@pytest.fixture
def picture(page: Any) -> Callable[[str], None]:
    """Keep a picture of the page, where a folder is named for them."""

    def take(name: str) -> None:
        folder = os.environ.get("SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)

    return take


def go(page: Any, tab: str) -> None:
    """Open a tab."""
    page.get_by_role("tab", name=tab, exact=True).click()
    expect(page.locator(f"#tab-{tab.lower()}")).to_be_visible()


def fill(page: Any, elem_id: str, text: str) -> None:
    """Write into a field."""
    page.locator(f"#{elem_id} textarea, #{elem_id} input").first.fill(text)


def number(page: Any, elem_id: str, wanted: int) -> None:
    """Set a slider by its number, once it has been drawn and listens."""
    field = page.locator(f"#{elem_id} input[type=number]")
    for _ in range(5):
        field.fill(str(wanted))
        field.press("Tab")
        page.wait_for_timeout(500)
        if field.input_value() == str(wanted):
            return
    raise AssertionError(f"{elem_id} does not take {wanted}")


def unfold(page: Any, elem_id: str) -> None:
    """Open an accordion."""
    page.locator(f"#{elem_id} > button").click()


def value(page: Any, elem_id: str) -> str:
    """What a dropdown or field holds."""
    return page.locator(f"#{elem_id} input, #{elem_id} textarea").first.input_value()


def ended(page: Any, kind: str, state: str = "done") -> None:
    """Wait until a tab's run is in a state from which nothing more happens."""
    bar = page.locator(f"#{kind}-progress .wb-progress")
    last = re.compile("done|failed|cancelled")
    expect(bar).to_have_attribute("data-state", last, timeout=RUN)
    assert bar.get_attribute("data-state") == state, bar.inner_text()


def says(page: Any, elem_id: str, words: str) -> None:
    """Wait for a sentence in a box."""
    expect(page.locator(f"#{elem_id}")).to_contain_text(words, timeout=30_000)


def test_engine_starts_with_the_page(page: Any) -> None:
    chip = page.locator("#engine-status .wb-chip")
    expect(chip).to_have_text(re.compile("Engine (starting|ready)"), timeout=30_000)
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
    expect(page.locator("#set-editor")).to_contain_text("rainy Sunday", timeout=30_000)
    fill(page, "set-name", "my-own")
    page.click("#set-keep-rows")
    says(page, "set-notice", "Kept as 'my-own'")
    expect(page.locator("#extract-set input")).to_have_value("my-own")


def test_extract(page: Any, picture: Callable[[str], None]) -> None:
    go(page, "Extract")
    fill(page, "extract-name", "sunny")
    page.click("#extract-run")
    ended(page, "extract")
    says(page, "extract-sentence", "'sunny' revision")
    expect(page.locator("#extract-chart .main-svg").first).to_be_visible()
    unfold(page, "extract-twin")
    expect(page.locator("#extract-blocks")).to_contain_text("AUROC")
    picture("1-extract")


def test_a_bad_name_is_a_sentence(page: Any) -> None:
    go(page, "Extract")
    fill(page, "extract-name", "<img src=x onerror=alert(1)>")
    page.click("#extract-run")
    says(page, "extract-notice", "name")
    expect(page.locator("#extract-notice [role=alert]")).to_be_visible()
    assert page.locator("#extract-notice img").count() == 0
    fill(page, "extract-name", "sunny")


def test_steer_side_by_side(page: Any, picture: Callable[[str], None]) -> None:
    go(page, "Steer")
    expect(page.locator("#steer-vector input")).to_have_value(re.compile("sunny"), timeout=30_000)
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
    expect(page.locator("#steer-curl")).to_contain_text("curl", timeout=30_000)
    picture("2-steer")


def test_a_second_turn_and_a_retry(page: Any) -> None:
    go(page, "Steer")
    fill(page, "steer-prompt", "And tomorrow?")
    page.click("#steer-send")
    expect(page.locator("#steer-steered [data-testid=bot]")).to_have_count(2, timeout=REPLY)
    expect(page.locator("#steer-send")).to_be_enabled(timeout=REPLY)
    page.click("#steer-retry")
    page.wait_for_timeout(1000)
    expect(page.locator("#steer-send")).to_be_enabled(timeout=REPLY)
    expect(page.locator("#steer-receipt")).to_contain_text("positions steered")
    expect(page.locator("#steer-steered [data-testid=bot]")).to_have_count(2)
    page.click("#steer-clear")
    expect(page.locator("#steer-steered [data-testid=bot]")).to_have_count(0)


def test_stop_keeps_what_came(page: Any) -> None:
    go(page, "Steer")
    page.click("#steer-clear")
    number(page, "steer-tokens", 1024)
    fill(page, "steer-prompt", "Tell me everything.")
    # The tiny model is quick, so the button is pressed as soon as it is there.
    page.evaluate(
        """() => { const timer = setInterval(() => {
            const stop = document.querySelector("#steer-stop");
            if (stop) { stop.click(); clearInterval(timer); }
        }, 20); }"""
    )
    page.click("#steer-send")
    expect(page.locator("#steer-receipt")).to_contain_text("Stopped", timeout=REPLY)
    expect(page.locator("#steer-send")).to_be_enabled()
    number(page, "steer-tokens", 12)


def test_a_wrong_term_is_a_sentence(page: Any) -> None:
    go(page, "Steer")
    unfold(page, "steer-where")
    fill(page, "steer-further", "nobody=0.1")
    fill(page, "steer-prompt", "Hello")
    page.click("#steer-send")
    says(page, "steer-notice", "nobody")
    assert value(page, "steer-prompt") == "Hello"
    fill(page, "steer-further", "")


def test_verify_survives_a_reload(page: Any, picture: Callable[[str], None]) -> None:
    go(page, "Verify")
    expect(page.locator("#verify-vector input")).to_have_value(re.compile("sunny"), timeout=30_000)
    fill(page, "verify-doses", "0.1, 0.2")
    fill(page, "verify-controls", "1")
    page.click("#verify-run")
    bar = page.locator("#verify-progress .wb-progress")
    expect(bar).to_have_attribute("data-state", "running", timeout=REPLY)
    page.reload()
    go(page, "Verify")
    expect(bar).to_be_visible(timeout=30_000)
    ended(page, "verify")
    # One random direction is too few to pass, which is the truth about one.
    expect(page.locator("#verify-verdict [data-passed=false]")).to_be_visible()
    expect(page.locator("#verify-chart .main-svg").first).to_be_visible()
    unfold(page, "verify-twin")
    expect(page.locator("#verify-doses-table")).to_contain_text("+0.1")
    picture("3-verify")


def test_a_run_is_cancelled(page: Any) -> None:
    go(page, "Verify")
    fill(page, "verify-doses", "0.05, 0.15, 0.25, 0.3, 0.35")
    fill(page, "verify-controls", "60")
    page.click("#verify-run")
    bar = page.locator("#verify-progress .wb-progress")
    expect(bar).to_have_attribute("data-state", "running", timeout=REPLY)
    page.click("#verify-cancel")
    ended(page, "verify", "cancelled")


def test_train(page: Any, picture: Callable[[str], None]) -> None:
    go(page, "Train")
    says(page, "train-notice", "did not pass")
    unfold(page, "train-settings")
    for field, number in (("prompts", "8"), ("tokens", "6")):
        fill(page, f"train-{field}", number)
    page.click("#train-run")
    ended(page, "train")
    says(page, "train-sentence", "recover")
    expect(page.locator("#train-margins")).to_contain_text("margin")
    expect(page.locator("#train-chart .main-svg").first).to_be_visible()
    picture("4-train")


def test_compare(page: Any, picture: Callable[[str], None]) -> None:
    go(page, "Compare")
    trained = page.locator("#compare-task input")
    expect(trained).to_have_value(re.compile("sunny-baked"), timeout=30_000)
    unfold(page, "compare-writing")
    number(page, "compare-tokens", 8)
    fill(page, "compare-prompts", "How was your day?\nWhat is for dinner?")
    page.click("#compare-run")
    ended(page, "compare")
    expect(page.locator("#compare-rows")).to_contain_text("What is for dinner?")
    expect(page.locator("#compare-margins")).to_contain_text("weights")
    fill(page, "compare-live-prompt", "Hello there")
    page.click("#compare-live-send")
    receipt = page.locator("#compare-live-trained-receipt")
    expect(receipt).to_contain_text("weights", timeout=RUN)
    assert "weights base" not in receipt.inner_text()
    expect(page.locator("#compare-live-steered-receipt")).to_contain_text("positions steered")
    picture("5-compare")


def test_library(page: Any, picture: Callable[[str], None]) -> None:
    go(page, "Library")
    expect(page.locator("#library-table")).to_contain_text("sunny-baked", timeout=30_000)
    page.locator("#library-table").get_by_text("sunny", exact=True).first.click()
    says(page, "library-summary", "sunny (revision")
    with page.expect_download() as download:
        page.click("#library-download")
    assert download.value.suggested_filename == "sunny.safetensors"
    expect(page.locator("#runs-table")).to_contain_text("cancelled")
    picture("6-library")


def test_recipes_rename_delete_restore(page: Any) -> None:
    go(page, "Library")
    unfold(page, "library-recipes")
    fill(page, "library-terms", "sunny-baked=0.5")
    fill(page, "library-recipe-name", "half-sunny")
    page.click("#library-combine")
    says(page, "library-notice", "Kept 'half-sunny'")
    expect(page.locator("#library-entry input")).to_have_value("half-sunny")
    unfold(page, "library-acts")
    fill(page, "library-new-name", "mild")
    page.click("#library-rename")
    says(page, "library-notice", "is now called 'mild'")
    expect(page.locator("#library-entry input")).to_have_value("mild")
    page.click("#library-delete")
    page.click("#library-delete-yes")
    says(page, "library-notice", "'mild' is deleted")
    expect(page.locator("#library-table")).not_to_contain_text("mild")
    page.click("#library-undo")
    says(page, "library-notice", "'mild' is back")
    expect(page.locator("#library-table")).to_contain_text("mild")


def test_nothing_ran_as_script(dialogs: list[str]) -> None:
    assert dialogs == []
