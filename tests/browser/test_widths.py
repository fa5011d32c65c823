"""Every tab on a wide and a narrow page, light and dark: nothing is cut off, and all of it can be read.

The page is the one that `test_walk.py` leaves, where it ran before; else an empty one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests_support.browser import TABS, expect, go

pytest.importorskip("gradio", reason="the page's extra is not installed")
pytest.importorskip("vllm", reason="vLLM is not installed on this machine")
pytest.importorskip("playwright", reason="playwright is not installed")

pytestmark = [pytest.mark.browser, pytest.mark.engine]

LEAST_CONTRAST = 4.5
"""Between text and what is behind it: Web Content Accessibility Guidelines 2.2, 1.4.3, level AA."""

LOOK = """() => {
  const seen = (e) => {
    const box = e.getBoundingClientRect(), style = getComputedStyle(e);
    return box.width > 0 && box.height > 0 && style.visibility !== "hidden" && style.opacity !== "0";
  };
  const parents = (e) => { const all = []; for (let p = e; p; p = p.parentElement) all.push(p); return all; };
  const scrolls = (e) => parents(e.parentElement).some((p) => p !== document.body
    && p !== document.documentElement && /auto|scroll/.test(getComputedStyle(p).overflowX));
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (a, b) => [0, 1, 2].map((i) => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
  const behind = (e) => parents(e).map((p) => rgba(getComputedStyle(p).backgroundColor))
    .concat([[255, 255, 255, 1]]).reduceRight((below, above) => over(above, below));
  const light = (colour) => {
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = colour.map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const cut = [], faint = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    const e = node.parentElement, words = node.textContent.trim().slice(0, 40);
    if (!words || !seen(e) || e.closest("svg, script, style, :disabled, [aria-hidden=true]")) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect();
    if (box.width < 2 || box.height < 2) continue;
    if ((box.right > innerWidth + 1 || box.left < -1) && !scrolls(e)) cut.push(words);
    const back = behind(e), front = over(rgba(getComputedStyle(e).color), back);
    const [high, low] = [light(front), light(back)].sort((a, b) => b - a);
    faint.push([words, (high + 0.05) / (low + 0.05)]);
  }
  return { beyond: document.documentElement.scrollWidth - innerWidth, cut, faint };
}"""


PLANT = """(width) => {
  const note = document.createElement("p");
  note.innerHTML = "<span style='color: #aaa; background: #bbb'>Planted words.</span>";
  note.style.cssText = `position: absolute; left: 0; top: 0; width: ${width}px; text-align: right`;
  note.id = "planted";
  document.body.append(note);
}"""
CLOSED = "button.label-wrap:not(.open):visible"


@pytest.fixture
def looked_at(chromium: Any, tiny_url: str) -> Iterator[Callable[[int, str], Any]]:
    """Open the page at a width and in a theme; it is closed with the test, for it asks for news all the
    time.
    """
    contexts: list[Any] = []

    def opened(width: int, theme: str) -> Any:
        contexts.append(chromium.new_context(viewport={"width": width, "height": 900}))
        page = contexts[-1].new_page()
        page.goto(f"{tiny_url}/?__theme={theme}")
        expect(page.locator("#engine-status .wb-chip")).to_be_visible()
        return page

    yield opened
    for context in contexts:
        context.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_tab_fits_and_can_be_read(looked_at: Any, width: int, theme: str) -> None:
    page = looked_at(width, theme)
    for tab in TABS:
        go(page, tab)
        page.wait_for_timeout(1000)
        folded = page.locator(f"#tab-{tab.lower()}").locator(CLOSED)
        while folded.count():
            folded.first.click()
        page.wait_for_timeout(500)
        found = page.evaluate(LOOK)
        faint = [(words, ratio) for words, ratio in found["faint"] if ratio < LEAST_CONTRAST]
        assert len(found["faint"]) > 10, f"{tab} shows next to nothing"
        assert (tab, found["beyond"], found["cut"], faint) == (tab, 0, [], [])


def test_what_is_cut_off_or_faint_is_seen(looked_at: Any) -> None:
    page = looked_at(390, "light")
    assert page.evaluate(LOOK)["cut"] == []
    page.evaluate(PLANT, 500)
    found = page.evaluate(LOOK)
    assert found["beyond"] > 0 and found["cut"] == ["Planted words."]
    assert dict(found["faint"])["Planted words."] < LEAST_CONTRAST
    # Where the page hides what is beyond its edge, it is no less cut off.
    page.evaluate("() => { document.documentElement.style.overflowX = 'hidden'; }")
    assert page.evaluate(LOOK)["cut"] == ["Planted words."]
