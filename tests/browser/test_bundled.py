"""The whole loop in a browser on the bundled model: what a person does first.

It is measured with little, so that it is short; the verdict says so. With KEPT set to a home where
`workbench extract`, `verify` and `train` ran with their defaults (vector `cheerful`, task vector
`cheerful-baked`), the page shows what they found instead, and with PICTURES set to a folder each tab
leaves a picture there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests_support.browser import (
    ENGINE,
    RUN,
    begin,
    ended,
    expect,
    fill,
    go,
    number,
    says,
    served,
    unfold,
    value,
)

pytest.importorskip("gradio", reason="the page's extra is not installed")
pytest.importorskip("vllm", reason="vLLM is not installed on this machine")
pytest.importorskip("playwright", reason="playwright is not installed")

pytestmark = [pytest.mark.browser, pytest.mark.engine]
PICTURES = os.environ.get("PICTURES")
KEPT = os.environ.get("KEPT")
QUESTION = "Tell me about the beach."


@pytest.fixture(scope="module")
def page(chromium: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page on the session's bundled model and engine, or on the home that was kept."""
    if KEPT:
        home = Path(KEPT)
    else:
        workbench = request.getfixturevalue("workbench")
        workbench.engine()
        home = workbench.home.root
    with served(home) as url:
        context = chromium.new_context(viewport={"width": 1280, "height": 900})
        found = context.new_page()
        found.goto(url)
        yield found
        context.close()


def picture(page: Any, name: str) -> None:
    """Keep a picture of the page, where a folder is named for them."""
    if PICTURES:
        Path(PICTURES).mkdir(parents=True, exist_ok=True)
        page.wait_for_timeout(1000)
        page.screenshot(path=Path(PICTURES) / f"{name}.png", full_page=True)


def test_extract(page: Any) -> None:
    expect(page.locator("#engine-status .wb-chip")).to_have_text("Engine ready", timeout=ENGINE)
    go(page, "Extract")
    says(page, "extract-counts", "held out")
    if not KEPT:
        begin(page, "extract")
    ended(page, "extract")
    says(page, "extract-sentence", "'cheerful' revision")
    expect(page.locator("#extract-sentence .wb-good")).to_be_visible()
    picture(page, "1-extract")


def test_steer(page: Any) -> None:
    go(page, "Steer")
    expect(page.locator("#steer-vector input")).to_have_value(re.compile("cheerful"))
    unfold(page, "steer-writing")
    number(page, "steer-tokens", 64 if KEPT else 40)
    unfold(page, "steer-writing")
    fill(page, "steer-prompt", QUESTION)
    page.click("#steer-send")
    expect(page.locator("#steer-receipt")).to_contain_text("positions steered")
    replies = [page.locator(f"#steer-{who} [data-testid=bot]") for who in ("plain", "steered")]
    plain, steered = (reply.inner_text() for reply in replies)
    assert len(plain) > 40 and len(steered) > 40 and plain != steered
    picture(page, "2-steer")


def test_verify(page: Any) -> None:
    go(page, "Verify")
    if not KEPT:
        fill(page, "verify-doses", "-0.2, 0.2")
        fill(page, "verify-controls", "1")
        begin(page, "verify")
    ended(page, "verify")
    verdict = page.locator(f"#verify-verdict [data-passed={'true' if KEPT else 'false'}]")
    expect(verdict).to_contain_text("random directions of equal norm")
    if not KEPT:
        # The direction does what it should; only the number of controls is too small to say so.
        expect(verdict.locator(".wb-no")).to_have_count(1)
        expect(verdict.locator(".wb-no")).to_contain_text("at least 19 are needed to pass")
    picture(page, "3-verify")


def test_train(page: Any) -> None:
    go(page, "Train")
    if not KEPT:
        says(page, "train-notice", "did not pass")
        unfold(page, "train-settings")
        fill(page, "train-prompts", "8")
        fill(page, "train-tokens", "12")
        page.locator("#train-read-pairs input").uncheck()
        begin(page, "train")
    ended(page, "train")
    says(page, "train-sentence", "'cheerful-baked' revision")
    expect(page.locator("#train-margins")).to_contain_text("margin")
    if KEPT:
        expect(page.locator("#train-sentence .wb-good")).to_be_visible()
    picture(page, "4-train")


def test_compare(page: Any) -> None:
    go(page, "Compare")
    expect(page.locator("#compare-task input")).to_have_value(re.compile("cheerful-baked"))
    unfold(page, "compare-writing")
    number(page, "compare-tokens", 48 if KEPT else 24)
    unfold(page, "compare-writing")
    if KEPT:
        fill(page, "compare-prompts", f"{QUESTION}\nMy train is late again.")
        begin(page, "compare")
        ended(page, "compare")
        expect(page.locator("#compare-rows")).to_contain_text(QUESTION)
    fill(page, "compare-live-prompt", QUESTION)
    page.click("#compare-live-send")
    receipt = page.locator("#compare-live-trained-receipt")
    expect(receipt).to_contain_text("weights", timeout=RUN)
    assert "weights base" not in receipt.inner_text()
    picture(page, "5-compare")


def test_library(page: Any) -> None:
    go(page, "Library")
    expect(page.locator("#library-table")).to_contain_text("cheerful-baked")
    picture(page, "6-library")


@pytest.mark.skipif(bool(KEPT), reason="a home that is kept stays as it is")
def test_rename_delete_restore(page: Any) -> None:
    unfold(page, "library-acts")
    fill(page, "library-new-name", "glad-baked")
    page.click("#library-rename")
    says(page, "library-notice", "is now called 'glad-baked'")
    expect(page.locator("#library-entry input")).to_have_value("glad-baked")
    page.click("#library-delete")
    page.click("#library-delete-yes")
    says(page, "library-notice", "'glad-baked' is deleted")
    page.click("#library-restore")
    says(page, "library-notice", "'glad-baked' is back")
    assert value(page, "library-entry") == "glad-baked"
