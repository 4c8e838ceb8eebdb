"""Several labels a sample, as tables have them: joined in a cell, or a list."""

from collections.abc import Sequence
from typing import Any

from selfdistill.data.errors import UserError
from selfdistill.data.sources import scored
from selfdistill.data.sources.samples import Row

#: Before each name of a list that `data.sources.parquet` writes into a CSV, and alone before none.
LISTED = "\x1f"


def separated(cell: str, separator: str | None, where: str) -> str | tuple[str, ...]:
    """The label of a cell, or its labels where a separator is known.

    Args:
        cell: As it stands in a table, "a;b" perhaps.
        separator: Between two names; None where a sample has one label.
        where: The row, for messages.

    Raises:
        UserError: A name is empty, or stands there twice.
    """
    if cell.startswith(LISTED):
        return listed(cell.split(LISTED)[1 if len(cell) > 1 else 2 :], where)
    cell = cell.strip()
    if separator is None:
        return cell
    return listed(cell.split(separator) if cell else [], where)


def listed(values: Sequence[Any], where: str) -> tuple[str, ...]:
    """The names of a list of labels; whole numbers are names, too.

    Raises:
        UserError: One is neither, is empty, or stands there twice.
    """
    names = []
    for value in values:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, str | int) or value in (None, ""):
            raise UserError(
                f"{where}: among its labels is {value!r}, neither a name nor a number: correct it"
            )
        name = str(value).strip()
        if not name or (isinstance(value, int) and value < 0):
            raise UserError(f"{where}: among its labels is {value!r}, no class: correct it")
        if name in names:
            raise UserError(f"{where}: the label {name!r} stands there twice: correct it")
        names.append(name)
    return tuple(names)


def check(rows: Sequence[Row], separator: str | None, place: object) -> None:
    """Refuses lists beside single labels, and a separator that separates nothing.

    Args:
        rows: Of the source.
        separator: As asked for.
        place: The source, for messages.

    Raises:
        UserError: says which.
    """
    single = next((row for row in rows if isinstance(row.label, str)), None)
    several = next((row for row in rows if isinstance(row.label, tuple)), None)
    if single is not None and several is not None:
        raise UserError(
            f"{single.where}: its label is {single.label!r}, and that of {several.where} a list:"
            " make lists of all ([] for no class)"
        )
    lists = [row.label for row in rows if isinstance(row.label, tuple) and row.label]
    once = all(len(names) == 1 for names in lists)
    if separator is not None and once and scored.classes() is None:
        shown = lists[0][0] if lists else ""
        raise UserError(
            f"--label_separator {separator!r}: no label of {place} has it, such as {shown!r}: leave"
            " it out, or give the one that stands between two names"
        )
