"""A report as Markdown, in GitHub's dialect, its figures as files beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from selfdistill.experiments.report.blocks import (
    Block,
    Code,
    Drawing,
    Entry,
    Fold,
    Grid,
    Report,
    Section,
    Text,
)

#: Folder of the figures, beside the page.
FIGURES = "figures"


def escape(text: str) -> str:
    """Text that Markdown takes for nothing else; on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|~#&])", r"\\\1", " ".join(text.split()))


def render(report: Report) -> str:
    """The whole page."""
    lines = [f"# {escape(report.title)}", escape(report.lead)]
    for section in report.sections:
        lines += _section(section, 2)
    return "\n\n".join(one for one in lines if one) + "\n"


def _section(section: Section, level: int) -> list[str]:
    lines = [f"{'#' * level} {escape(section.title)}", *_blocks(section.blocks)]
    for part in section.parts:
        lines += _section(part, level + 1)
    return lines


def _blocks(blocks: Sequence[Block]) -> list[str]:
    parts: list[str] = []
    for block in blocks:
        if isinstance(block, Text):
            lines = [escape(part) for part in block.parts]
            parts.append(
                "\n".join(f"- {one}" for one in lines) if block.notes else "\n\n".join(lines)
            )
        elif isinstance(block, Grid):
            parts.append(_grid(block))
        elif isinstance(block, Drawing):
            parts.append(f"![{escape(block.description)}]({FIGURES}/{block.name}.svg)")
            parts.append(escape(block.caption))
        elif isinstance(block, Code):
            parts.append("\n".join(["```", *block.lines, "```"]))
        elif isinstance(block, Fold):
            parts.append(f"<details><summary>{_html(block.title)}</summary>")
            parts += [*_blocks(block.blocks), "</details>"]
    return parts


def _html(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _grid(grid: Grid) -> str:
    rules = ["---" if i < grid.labels else "---:" for i in range(len(grid.head))]
    lines = [_line([_entry(e, head=True) for e in grid.head]), _line(rules)]
    lines += [_line([_entry(e, paper=line.paper) for e in line.entries]) for line in grid.lines]
    caption = f"{escape(grid.caption[:1].upper() + grid.caption[1:])}:\n\n" if grid.caption else ""
    return caption + "\n".join(lines)


def _line(entries: Sequence[str]) -> str:
    return f"| {' | '.join(entries)} |"


def _entry(entry: Entry, head: bool = False, paper: bool = False) -> str:
    if entry.style == "code":
        # In a table a bar ends the cell even within code.
        return "`" + entry.text.replace("|", "\\|") + "`"
    text = escape(entry.text)
    more = escape(entry.more)
    if text and entry.style == "best":
        text = f"**{text}**"
    if text and (paper or entry.style == "missing"):
        text = f"*{text}*"
    cell = f"{text} ({more})" if head and more else f"{text} {more}"
    return cell.strip()
