"""CSV and TSV files with a header."""

import csv
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from selfdistill.data.errors import UserError
from selfdistill.data.splits import ALIASES, DIVIDED

#: Characters, or bytes, of a line at most: what follows no line's end is not read whole.
LONGEST = 2**28


def read(path: Path) -> tuple[list[str], Iterator[tuple[int, dict[str, str]]]]:
    """A table's header, and its rows as they are asked for.

    Args:
        path: .csv (RFC 4180; semicolons or tabs may stand for the commas), or .tsv, in which
            quotation marks mean nothing.

    Returns:
        Names of the columns; an iterator of (number of the row's last line, fields by column).

    Raises:
        UserError: It cannot be opened, is not UTF-8, or a row has another number of fields.
    """
    rows = _rows(path)
    return list(next(rows)[1]), rows


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    tsv = path.suffix.lower() == ".tsv"
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a long document is a long field
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            form: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
            if not tsv:
                first = file.readline(LONGEST)
                told = re.fullmatch(r"sep=(.)\s*", first)  # Excel's, before the header
                form = {"delimiter": told[1] if told else separator(first), "strict": True}
                if not told:
                    file.seek(0)
            before = int(not tsv and told is not None)
            reader = csv.DictReader(_lines(path, file), **form)
            header = reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            twice = next((c for i, c in enumerate(header) if c in header[:i]), None)
            if twice is not None:
                raise UserError(f"{path} has the column {twice!r} twice: rename one of them")
            yield 1, dict.fromkeys(header, "")
            for row in reader:
                line = reader.line_num + before
                if None in row or None in row.values():
                    raise UserError(
                        f"{path} line {line} has not as many fields as the header: correct the file"
                    )
                # Excel has empty ones below a table.
                if len(header) == 1 or any(value.strip() for value in row.values()):
                    yield line, row
    except UnicodeDecodeError:
        kind = "TSV" if tsv else "CSV"
        raise UserError(f"{path} is not text in UTF-8: save it as {kind} in UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}: {error}: correct the file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be opened ({error.strerror}): check it") from None


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    while line := file.readline(LONGEST):
        if len(line) >= LONGEST:
            raise UserError(f"{path} has a line of more than {LONGEST:,} characters: divide it")
        yield line


def separator(header: str) -> str:
    """What separates a file's columns: of commas, ``;`` and tabs what makes most of its header."""
    return max((",", ";", "\t"), key=lambda one: len(next(csv.reader([header], delimiter=one), [])))


def split_of(row: dict[str, str], where: str) -> str:
    """The split that a row names in its column `split`; "" without such a column.

    Raises:
        UserError: It names none of the splits.
    """
    if "split" not in row:
        return ""
    split = row["split"].strip().lower()
    if split not in ALIASES:
        raise UserError(
            f"{where}: split {split!r} is none of {', '.join(DIVIDED)}: correct the file"
        )
    return ALIASES[split]
