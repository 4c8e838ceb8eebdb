"""A report as one HTML page that needs nothing else: style and figures stand in it."""

from __future__ import annotations

import re
from pathlib import Path

import jinja2
from markupsafe import Markup

from selfdistill.experiments.report.blocks import Block, Drawing, Report
from selfdistill.launcher.pages.drawing import inline

TEMPLATE = Path(__file__).resolve().parent / "report.html.jinja"


def _kind(block: Block) -> str:
    return type(block).__name__.lower()


def _picture(drawing: Drawing) -> Markup:
    """A figure for those who see it, and its description for those who do not."""
    description = jinja2.filters.do_forceescape(drawing.description)
    start = f'<svg role="img" aria-label="{description}"'
    drawn = inline(drawing.svg, drawing.name)  # our own figure, not a user's text
    return Markup(drawn.replace("<svg", start, 1))


def _options(line: str) -> Markup:
    """A line that is typed: no option is broken at its hyphens."""
    text = str(jinja2.filters.do_forceescape(line))
    return Markup(re.sub(r"(?<!\S)--?[\w.]+", r"<i>\g<0></i>", text))  # escaped above


def render(report: Report) -> str:
    """The whole page."""
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["kind"] = _kind
    environment.filters["options"] = _options
    environment.filters["picture"] = _picture
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(report=report) + "\n"
