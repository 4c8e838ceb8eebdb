"""A picture of TensorBoard: `python -m launcher.screenshot runs/cub docs/x.png --tab scalars`.

Starts this environment's own TensorBoard on a free port of this machine, opens it in a headless
Chromium, waits until every chart and picture of the tab is truly drawn, and ends both.
"""

import contextlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import quote

from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

from selfdistill.data import cli
from selfdistill.data.errors import UserError

if TYPE_CHECKING:
    from playwright.sync_api import Page

Tab = Literal["timeseries", "scalars", "images", "text", "hparams"]

#: Programs that are a Chromium, as they are looked for on PATH.
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")

#: Tallest picture in pixels; what lies below is left out.
TALLEST = 8000

# TensorBoard's newer tabs are Angular components, its older ones Polymer elements, whose insides
# are shadow trees that querySelectorAll does not enter: `deep` does.
SCRIPT = """
(() => {
  const deep = (selector, root = document) => {
    const found = [...root.querySelectorAll(selector)];
    for (const e of root.querySelectorAll('*'))
      if (e.shadowRoot) found.push(...deep(selector, e.shadowRoot));
    return found;
  };
  const inside = (e, selector) =>
    [...deep(selector, e), ...(e.shadowRoot ? deep(selector, e.shadowRoot) : [])];
  const seen = e => e.getBoundingClientRect().height > 0;
  const scrolls = e => ['auto', 'scroll'].includes(getComputedStyle(e).overflowY);
  const loaded = e => inside(e, 'img').some(i => i.complete && i.naturalWidth > 0);
  const kinds = {
    'tf-scalar-card': ['scalar', e => e.tag,
      e => inside(e, '.render-area path').some(p => (p.getAttribute('d') || '').length > 9)],
    'scalar-card-component': ['scalar', e => e.querySelector('tb-truncated-path')?.title,
      e => inside(e, 'line-chart').length && inside(e, 'line-chart-axis text').length > 1
        && !inside(e, 'mat-spinner').length],
    'tf-image-loader': ['image', e => e.tag, loaded],
    'image-card-component': ['image', e => e.querySelector('tb-truncated-path')?.title, loaded],
    'tf-text-loader': ['text', e => e.tag,
      e => inside(e, 'tf-markdown-view').some(m => inside(m, '#markdown')
        .some(t => t.innerText.trim().length))],
  };
  const cards = () => {
    const all = [];
    for (const [selector, [kind, name, drawn]] of Object.entries(kinds))
      for (const e of deep(selector).filter(seen))
        all.push({kind, name: name(e) || '', drawn: !!drawn(e)});
    for (const grid of deep('tf-hparams-table-view vaadin-grid').concat(
        deep('tf-hparams-table-view').flatMap(e => inside(e, 'vaadin-grid'))))
      for (const row of inside(grid, '#items tr').filter(seen)) {
        const slots = inside(row, 'slot').flatMap(s => s.assignedElements());
        const text = slots.map(s => s.innerText.trim()).filter(Boolean);
        if (text.length) all.push({kind: 'row', name: text[0], drawn: text.length > 1});
      }
    return all;
  };
  const prepare = (filtered, actual) => {
    deep('tf-category-paginated-view').forEach((pane, i) => {
      const wanted = filtered ? i == 0 : true;
      if (pane.opened != wanted) pane.shadowRoot?.querySelector('button.heading')?.click();
    });
    deep('button.group-toolbar:has([svgicon=expand_more_24px])').forEach(e => e.click());
    if (deep('metrics-dashboard-right-pane').some(seen))
      deep('metrics-main-view-component button').find(e => /settings/i.test(e.innerText))?.click();
    if (actual)
      deep('tf-image-dashboard paper-checkbox').concat(
          deep('tf-image-dashboard').flatMap(e => inside(e, 'paper-checkbox')))
        .filter(e => /actual image size/i.test(e.innerText) && !e.checked)
        .forEach(e => e.click());
    // A text's own scroll box never grows with the window: what it hides would not be seen.
    deep('tf-text-loader').flatMap(e => inside(e, '*')).filter(scrolls)
      .forEach(e => { e.style.maxHeight = 'none'; });
  };
  const missing = () => Math.max(0, ...deep('*')
    .filter(e => scrolls(e) && e.clientHeight > 200)
    .map(e => e.scrollHeight - e.clientHeight));
  return {cards, prepare, missing};
})()
"""


class Card(NamedTuple):
    """Something that a tab shows.

    Attributes:
        kind: "scalar", "image", "text", or "row" of the HParams table.
        name: the tag; of a row, the run.
        drawn: whether it is there to be seen, not still loading.
    """

    kind: str
    name: str
    drawn: bool


@contextlib.contextmanager
def chromium(width: int = 1400, height: int = 1000) -> Iterator["Page"]:
    """A page of this machine's Chromium, headless, with an empty profile.

    Args:
        width: of the window in CSS pixels.
        height: of the window in CSS pixels.

    Raises:
        UserError: there is no Chromium on PATH, or playwright is not installed.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise UserError(
            "playwright, which drives Chromium, is not installed: pip install playwright"
        ) from None
    program = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if program is None:
        raise UserError(
            "no Chromium on PATH: `make chromium` installs it on Debian and Ubuntu; elsewhere "
            "install your system's package 'chromium'"
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        try:
            yield browser.new_page(viewport={"width": width, "height": height})
        finally:
            browser.close()


@contextlib.contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """Runs TensorBoard over a folder of runs; gives its address.

    Raises:
        UserError: it did not start.
    """
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder)]
    command += ["--host", "127.0.0.1", "--port", "0"]
    # All is read before it serves, by its own reader: the page never shows half of a run.
    command += ["--load_fast", "false", "--reload_interval", "0", "--reload_task", "blocking"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        lines: list[str] = []
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.strip())
            if address := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        else:
            raise UserError(f"TensorBoard did not start: {' '.join(lines[-3:])}")
        yield address.group()
    finally:
        process.terminate()
        process.wait()


def take(
    folder: Path,
    tab: Tab = "scalars",
    *,
    tags: str = "",
    width: int = 1500,
    height: int = 0,
    actual_size: bool = False,
    timeout: float = 300.0,
) -> tuple[bytes, list[Card]]:
    """Takes the picture.

    Args:
        folder: of runs.
        tab: of TensorBoard.
        tags: regular expression; only tags in which it is found.
        width: of the window in pixels.
        height: of the window in pixels; 0 means as tall as what there is to see.
        actual_size: in the images tab, pictures pixel by pixel instead of small ones.
        timeout: seconds until it is given up.

    Returns:
        The PNG, and the cards that it shows.

    Raises:
        UserError: no event files, nothing in this tab, no such tags, or it was not drawn in time.
    """
    if next(folder.rglob("events.out.tfevents.*"), None) is None:
        raise UserError(f"{folder}: no TensorBoard events below it: name a folder of runs")
    if tab != "hparams":
        _check_tags(folder, tab, tags)
    deadline = time.monotonic() + timeout
    with tensorboard(folder) as address, chromium(width, height or 1000) as page:
        # The newer tabs read the query, the older ones the fragment.
        found = f"tagFilter={quote(tags)}"
        page.goto(f"{address}/?{found}#{tab}&{found}" if tags else f"{address}/#{tab}")
        prepare = f"prepare({str(bool(tags)).lower()}, {str(actual_size).lower()})"
        picture, cards = _rest(page, prepare, tab, folder, deadline)
        tall = height or 1000
        # The HParams tab's column of options is long, its table is not.
        grows = height == 0 and tab != "hparams"
        # What comes into sight is loaded then, and may make the page taller still.
        while grows and tall < TALLEST and (more := page.evaluate(f"{SCRIPT}.missing()")):
            tall = min(tall + int(more), TALLEST)
            page.set_viewport_size({"width": width, "height": tall})
            picture, cards = _rest(page, prepare, tab, folder, deadline)
    return picture, cards


def _check_tags(folder: Path, tab: Tab, tags: str) -> None:
    """Refuses a filter that leaves nothing, before TensorBoard is started and waited for.

    Raises:
        UserError: no tag of the tab matches, or there is none.
    """
    plugins = ("scalars", "images") if tab == "timeseries" else (tab,)
    # All that counts is which tags there are: of each, the newest value is read.
    reader = EventMultiplexer(tensor_size_guidance=dict.fromkeys(plugins, 1))
    reader.AddRunsFromDirectory(str(folder)).Reload()
    found = {
        tag
        for plugin in plugins
        for run in reader.PluginRunToTagToContent(plugin).values()
        for tag in run
    }
    try:
        matching = [tag for tag in found if re.search(tags, tag)]
    except re.error as error:
        raise UserError(f"--tags {tags}: no regular expression ({error}): correct it") from None
    if not found:
        raise UserError(f"{folder}: tab {tab}: nothing to see; try another --tab")
    if not matching:
        some = sorted(found)
        others = f" and {len(some) - 8} more" if len(some) > 8 else ""
        raise UserError(
            f"no tag matches /{tags}/ in the tab {tab} of {folder}; there are"
            f" {', '.join(some[:8])}{others}"
        )


def _rest(
    page: "Page", prepare: str, tab: Tab, folder: Path, deadline: float
) -> tuple[bytes, list[Card]]:
    """Waits until all cards are drawn and the picture changes no more."""
    last: Any = None
    while True:
        page.evaluate(f"{SCRIPT}.{prepare}")
        cards = [Card(**card) for card in page.evaluate(f"{SCRIPT}.cards()")]
        picture = page.screenshot()
        if cards and all(card.drawn for card in cards) and last == (picture, cards):
            return picture, cards
        if time.monotonic() > deadline:
            waiting = [card.name for card in cards if not card.drawn]
            why = f"not drawn in time: {waiting[:5]}" if waiting else "nothing to see"
            if cards and not waiting:
                why = "the page does not come to rest"
            raise UserError(f"{folder}: tab {tab}: {why}; try another --tab or a longer --timeout")
        last = (picture, cards)
        time.sleep(1.0)


def screenshot(
    folder: str,
    picture: str,
    tab: Tab = "scalars",
    tags: str = "",
    width: int = 1500,
    height: int = 0,
    actual_size: bool = False,
    timeout: float = 300.0,
    overwrite: bool = False,
) -> None:
    """Takes a picture of TensorBoard in headless Chromium.

    Args:
        folder: Folder of runs, "runs" or "runs/NAME".
        picture: PNG file to write.
        tab: timeseries, scalars, images, text or hparams.
        tags: Regular expression; only tags in which it is found.
        width: Of the window in pixels.
        height: Of the window in pixels; 0 means as tall as what there is to see.
        actual_size: In the images tab, pictures pixel by pixel instead of small ones.
        timeout: Seconds until it is given up.
        overwrite: Replace the PNG if it is there.
    """
    target = Path(picture).expanduser()
    if target.suffix != ".png":
        raise UserError(f"{picture}: the picture is a PNG: name a file that ends in .png")
    if target.exists() and not overwrite:
        raise UserError(f"{picture} is there already: name another, or add --overwrite")
    png, cards = take(
        Path(folder).expanduser(),
        tab,
        tags=tags,
        width=width,
        height=height,
        actual_size=actual_size,
        timeout=timeout,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(png)
    print(f"{picture}: {len(cards)} cards: {', '.join(dict.fromkeys(c.name for c in cards))}")


if __name__ == "__main__":
    cli.run(screenshot)
