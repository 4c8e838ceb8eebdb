"""What a report is made of: blocks that the HTML page and Markdown both show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

#: best: bold; missing: failed, blocked, not run; up, down: differences told from 0; code: typed.
Style = Literal["", "best", "missing", "up", "down", "code"]


@dataclass(frozen=True)
class Entry:
    """One place of a grid.

    Attributes:
        text: what is read first.
        more: what stands beside or under it, smaller.
        style: how it is set.
    """

    text: str
    more: str = ""
    style: Style = ""


@dataclass(frozen=True)
class Line:
    """A line of a grid.

    Attributes:
        entries: one for each column.
        paper: whether its figures are the paper's, not ours.
    """

    entries: Sequence[Entry]
    paper: bool = False


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        head: the columns' names.
        lines: what stands below.
        caption: what it shows.
        labels: columns of words at its left; the others hold numbers.
        stacked: whether an entry's `more` stands under it.
    """

    head: Sequence[Entry]
    lines: Sequence[Line]
    caption: str = ""
    labels: int = 1
    stacked: bool = False

    def __post_init__(self) -> None:
        assert all(len(line.entries) == len(self.head) for line in self.lines), self.caption


@dataclass(frozen=True)
class Text:
    """A paragraph, or with `notes` a list of small print.

    Attributes:
        parts: the paragraph, or the notes.
        notes: whether it is small print.
    """

    parts: Sequence[str]
    notes: bool = False


@dataclass(frozen=True)
class Drawing:
    """A figure.

    Attributes:
        name: of its file, without .svg.
        svg: the whole file.
        description: what it shows, for those who do not see it.
        caption: below it.
    """

    name: str
    svg: str
    description: str
    caption: str


@dataclass(frozen=True)
class Code:
    """Lines to be typed, or files."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown on demand.

    Attributes:
        title: what is seen of it before.
        blocks: what it holds.
        paper: whether it is printed.
    """

    title: str
    blocks: Sequence[Block]
    paper: bool = False


Block = Grid | Text | Drawing | Code | Fold


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        key: its place in links.
        title: its heading.
        blocks: what it holds.
        parts: sections of it.
        listed: whether these stand in the contents.
    """

    key: str
    title: str
    blocks: Sequence[Block] = ()
    parts: Sequence[Section] = field(default_factory=tuple)
    listed: bool = False


@dataclass(frozen=True)
class Report:
    """All of it.

    Attributes:
        title: of the page.
        lead: one line below the title.
        sections: in order.
    """

    title: str
    lead: str
    sections: Sequence[Section]

    def drawings(self) -> list[Drawing]:
        """All figures, in order."""

        def inside(blocks: Sequence[Block]) -> list[Drawing]:
            found: list[Drawing] = []
            for block in blocks:
                if isinstance(block, Drawing):
                    found.append(block)
                elif isinstance(block, Fold):
                    found += inside(block.blocks)
            return found

        def of(section: Section) -> list[Drawing]:
            return inside(section.blocks) + [d for part in section.parts for d in of(part)]

        return [d for section in self.sections for d in of(section)]


def words(*texts: str) -> list[Entry]:
    """Entries of plain text."""
    return [Entry(one) for one in texts]


def notes(*texts: str) -> list[Block]:
    """Small print; nothing where there is none to say."""
    lines = [one for one in dict.fromkeys(texts) if one]
    return [Text(lines, notes=True)] if lines else []
