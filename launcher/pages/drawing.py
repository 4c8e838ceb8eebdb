"""How figures look, and their SVG: the same bytes for the same figure."""

from __future__ import annotations

import io
import re
from typing import Any

from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#767676"
INK = "#222222"

#: For `matplotlib.rc_context`.
STYLE: dict[Any, Any] = {
    # Text stays text: it is searched, read aloud, and takes the page's font.
    "svg.fonttype": "none",
    # The same figure has the same ids.
    "svg.hashsalt": "report",
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
}


def svg(figure: Figure) -> str:
    """A figure's file, the same for the same figure: without date and maker."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", out.getvalue(), flags=re.S)
    text = re.sub(r"<!DOCTYPE.*?>\s*", "", text, flags=re.S)
    return re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)


def inline(drawn: str, name: str) -> str:
    """A figure's SVG for a page that holds others: ids of its own, no file's head.

    Args:
        drawn: from `svg`.
        name: of the figure, without spaces.
    """
    text = drawn[drawn.index("<svg") :].strip()
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace('href="#', f'href="#{name}-')
    return text.replace("url(#", f"url(#{name}-")
