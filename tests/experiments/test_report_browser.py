"""What a person sees: the report of a sweep, opened in headless Chromium."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page

from selfdistill.data import cli
from selfdistill.experiments.report import __main__ as report
from selfdistill.launcher.pages.drawing import BLUE
from selfdistill.launcher.screenshot import chromium
from tests.kit.report import example

pytestmark = pytest.mark.browser

#: CSS pixels between the margins of an A4 page.
PAPER = 695

#: Boxes of a figure's texts that stick out of it, or lie on one another.
TEXTS = """
(() => {
  const bad = [];
  for (const svg of document.querySelectorAll('.picture svg')) {
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll('text')].map(t => [t, t.getBoundingClientRect()]);
    for (const [t, b] of texts)
      if (b.left < frame.left - 1 || b.right > frame.right + 1 ||
          b.top < frame.top - 1 || b.bottom > frame.bottom + 1)
        bad.push(`outside: ${t.textContent}`);
    for (const [i, [t, a]] of texts.entries())
      for (const [u, b] of texts.slice(i + 1))
        if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
            Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4)
          bad.push(`on one another: ${t.textContent}, ${u.textContent}`);
  }
  return bad;
})()
"""

#: Tables and figures that are wider than the column that they stand in.
WIDE = """
[...document.querySelectorAll('.table, .picture, pre')]
  .filter(e => e.getClientRects().length && e.scrollWidth > e.clientWidth + 1)
  .map(e => e.getAttribute('aria-label') || e.className || e.innerText.slice(0, 40))
"""


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    sweep = example(root)
    cli.run(report.main, [str(sweep.root), "--output", str(root / "out")])
    return root / "out" / "report.html"


@pytest.fixture
def page(html: Path) -> Iterator[Page]:
    with chromium(1280, 1000) as page:
        page.goto(html.as_uri())
        page.wait_for_selector("main")
        yield page


def pixels(page: Page) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_the_window(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 1000})
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("document.body.scrollWidth") <= width
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('main *')].filter(e => e.innerText)"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 10.5


def test_the_head_and_every_figure_are_drawn(page: Page) -> None:
    top = pixels(page)
    assert (top < 100).all(axis=-1).sum() > 3000, "no ink"
    assert (top[:, :250] < 200).any(), "no table of contents beside it"
    count = page.evaluate("document.querySelectorAll('.picture svg').length")
    assert count > 4
    for number in range(count):
        box = page.evaluate(
            f"(() => {{ const e = document.querySelectorAll('.picture svg')[{number}];"
            " e.scrollIntoView({behavior: 'instant'}); const b = e.getBoundingClientRect();"
            " return [b.left, b.top, b.width, b.height]; })()"
        )
        left, upper, wide, tall = map(int, box)
        assert wide > 500
        assert tall > 100
        part = pixels(page)[max(upper, 0) : upper + tall, left : left + wide].astype(int)
        grey = np.ptp(part, axis=-1)
        drawn = page.evaluate(f"document.querySelectorAll('.picture svg')[{number}].outerHTML")
        if BLUE.lower() in drawn.lower():  # a forest in which nothing is told from 0 is grey
            assert (grey > 60).sum() > 200, "no lines in colour"
        assert (part.max(axis=-1) < 100).sum() > 200, "no labels"


def test_labels_of_figures_neither_stick_out_nor_overlap(page: Page) -> None:
    assert page.evaluate(TEXTS) == []


def test_links_of_the_contents_lead_to_their_sections(page: Page) -> None:
    page.evaluate("document.documentElement.style.scrollBehavior = 'auto'")
    for link in ("#differences", "#search", "#missing"):
        page.evaluate(f"document.querySelector('nav a[href=\"{link}\"]').click()")
        top = page.evaluate(f"document.querySelector('{link}').getBoundingClientRect().top")
        assert 0 <= top < 1000, link


def test_what_is_folded_opens(page: Page) -> None:
    fold = "document.querySelector('#commands details')"
    before = page.evaluate(f"{fold}.getBoundingClientRect().height")
    page.evaluate(f"{fold}.querySelector('summary').click()")
    assert page.evaluate(f"{fold}.getBoundingClientRect().height") > before + 100


def test_paper_cuts_nothing_off(page: Page) -> None:
    page.emulate_media(media="print")
    page.set_viewport_size({"width": PAPER, "height": 1000})
    # A table of more data sets than the paper has.
    page.evaluate(
        "document.querySelectorAll('#table1 tr').forEach(row => {"
        " for (let i = 0; i < 5; i++) row.append(row.children[1].cloneNode(true)); })"
    )
    assert page.evaluate(WIDE) == []
    assert page.evaluate("document.documentElement.scrollWidth") == PAPER
    hidden = page.evaluate("getComputedStyle(document.querySelector('nav')).display")
    assert hidden == "none"
    # Folded tables are opened on paper; lists of commands are left out.
    shown = "document.querySelector('{}').checkVisibility()"
    assert page.evaluate(shown.format("details.paper .table"))
    assert not page.evaluate(shown.format("details.screen"))
    assert not page.evaluate(shown.format("#commands"))
    page.emulate_media(media="null")
    pdf = page.pdf(prefer_css_page_size=True, print_background=True)
    assert pdf.startswith(b"%PDF")
    assert 8 < pdf.count(b"/Type /Page\n") < 50
