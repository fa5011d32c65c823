"""Serve the page as a process of its own, and do in it what a person does."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workbench.engines.vllm.server import free_port

__all__ = [
    "ENGINE", "REPLY", "RUN", "TABS", "begin",
    "ended", "expect", "fill", "go", "number", "says", "served", "unfold",
    "value",
]  # fmt: skip

TABS = ("Extract", "Steer", "Verify", "Train", "Compare", "Library")
ENGINE, RUN, REPLY = 600_000, 600_000, 120_000
"""Milliseconds after which nothing more is hoped for: an engine's start, a run, a reply, on cores that
also do other work."""


@contextmanager
def served(home: Path, *options: str) -> Iterator[str]:
    """The page of `home`; yields its address."""
    port = free_port()
    command = [sys.executable, "-m", "ui", "--home", str(home), "--port", str(port), *options]
    process = subprocess.Popen(command)
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


def expect(locator: Any) -> Any:
    """Playwright's own, patient, and imported late: not every machine has it."""
    from playwright.sync_api import expect as patient

    patient.set_options(timeout=REPLY)
    return patient(locator)


def go(page: Any, tab: str) -> None:
    """Open a tab; on a narrow page it may be in the menu of those that do not fit."""
    expect(page.get_by_role("tab", name=TABS[0], exact=True)).to_be_visible()
    button = page.get_by_role("tab", name=tab, exact=True)
    if not button.is_visible():
        page.locator(".overflow-menu > button").first.click()
        button = page.locator(".overflow-dropdown").get_by_text(tab, exact=True)
    button.click()
    expect(page.locator(f"#tab-{tab.lower()}")).to_be_visible()


def fill(page: Any, elem_id: str, text: str) -> None:
    """Write into a field."""
    page.locator(f"#{elem_id} textarea, #{elem_id} input").first.fill(text)


def number(page: Any, elem_id: str, wanted: float) -> None:
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


def begin(page: Any, kind: str) -> None:
    """Click a tab's button and wait until its run is there, in place of the last one's bar."""
    page.click(f"#{kind}-run")
    bar = page.locator(f"#{kind}-progress .wb-progress")
    expect(bar).to_have_attribute("data-state", re.compile("queued|running"))


def ended(page: Any, kind: str, state: str = "done", timeout: float = RUN) -> None:
    """Wait until a tab's run is in a state from which nothing more happens."""
    bar = page.locator(f"#{kind}-progress .wb-progress")
    last = re.compile("done|failed|cancelled")
    expect(bar).to_have_attribute("data-state", last, timeout=timeout)
    assert bar.get_attribute("data-state") == state, bar.inner_text()


def says(page: Any, elem_id: str, words: str) -> None:
    """Wait for a sentence in a box."""
    expect(page.locator(f"#{elem_id}")).to_contain_text(words)
