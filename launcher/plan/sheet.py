"""A table of figures with the arithmetic below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.table import Table


@dataclass
class Sheet:
    """What is printed of one question.

    Attributes:
        title: above the table.
        columns: their heads; the first one is text, the others are numbers.
        rows: cells, as they are printed; an empty row is a line across.
        notes: below the table.
        bold: numbers of the rows that were asked for.
    """

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bold: set[int] = field(default_factory=set)

    def add(self, *cells: str, bold: bool = False) -> None:
        """Adds a row."""
        if bold:
            self.bold.add(len(self.rows))
        self.rows.append(cells)

    def show(self, console: Console) -> None:
        """Prints the table, then its notes."""
        table = Table(title=self.title, title_justify="left", box=box.SIMPLE, padding=0)
        for number, name in enumerate(self.columns):
            table.add_column(name, justify="right" if number else "left", no_wrap=not number)
        for number, cells in enumerate(self.rows):
            if cells:
                table.add_row(*cells, style="bold" if number in self.bold else "")
            else:
                table.add_section()
        console.print()
        console.print(table)
        for note in self.notes:
            console.print(note, style="dim", markup=False, highlight=False)


def duration(seconds: float) -> str:
    """Seconds as 12.3 s, 4:05 min, 3:10:00 h or 12.3 days."""
    if seconds > 3 * 86400:
        return f"{seconds / 86400:,.1f} days"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"
