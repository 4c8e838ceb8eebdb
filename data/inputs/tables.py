"""Rows of tables as inputs: texts, or the paths of pictures, in CSV, TSV, JSON Lines, plain lines.

Only where each row begins is held: a file may be larger than memory.
"""

import csv
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from selfdistill.data.cli import nearest
from selfdistill.data.errors import UserError
from selfdistill.data.files import opened
from selfdistill.data.formats.texts import Text
from selfdistill.data.inputs.base import Input, Inputs, broken
from selfdistill.data.inputs.files import Files
from selfdistill.data.sources.tables import LONGEST, separator
from selfdistill.data.sources.texts import JSONL

_CURE = "give a file of rows"


class Wanted(NamedTuple):
    """The columns that are read; all others are passed over."""

    path: str = "path"
    text: str = "text"
    pair: str = "text_pair"
    key: str = "id"


class _Lines:
    """A file's lines as text, and where the next one begins."""

    def __init__(self, file: BinaryIO, path: Path, at: int = 0) -> None:
        self.file, self.path, self.at = file, path, at
        file.seek(at)

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self.file.readline(LONGEST)
        if not line:
            raise StopIteration
        if len(line) >= LONGEST:
            raise UserError(f"{self.path} has a line of more than {LONGEST:,} bytes: divide it")
        begin, self.at = self.at, self.at + len(line)
        return line.decode("utf-8" if begin else "utf-8-sig")


class Rows:
    """The rows of a file, by their places.

    Args:
        path: .csv, .tsv, .jsonl, .ndjson, or .txt, whose lines are texts.

    Attributes:
        header: names of the columns of a CSV or TSV; None where each row names its own.
        count: of the rows.

    Raises:
        UserError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path, suffix = path, path.suffix.lower()
        self.form: dict[str, Any] | None = None
        self.header: list[str] | None = None
        self.plain = suffix not in (*JSONL, ".csv", ".tsv")
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        try:
            with opened(path, _CURE) as file:
                if suffix == ".tsv":
                    self.form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
                elif suffix == ".csv":
                    first = next(_Lines(file, path), "")
                    self.form = {"delimiter": separator(first), "strict": True}
                lines = _Lines(file, path)
                begins = np.fromiter(self._begins(lines), dtype=np.int64)
        except UnicodeDecodeError:
            raise UserError(f"{path} is not text in UTF-8: save it in UTF-8") from None
        except csv.Error as error:
            raise UserError(f"{path}: {error}: correct the file") from None
        except FileNotFoundError:
            raise UserError(f"there is no {path}: correct the name") from None
        self.begins: NDArray[np.int64] = begins
        self.count = len(begins)

    def _begins(self, lines: _Lines) -> Iterator[int]:
        if self.form is None:
            for begin, line in self._raw(lines):
                if line.strip():
                    yield begin
            return
        reader = csv.reader(lines, **self.form)
        self.header = [name.strip() for name in next(reader, [])]
        twice = next((c for i, c in enumerate(self.header) if c in self.header[:i]), None)
        if twice is not None:
            raise UserError(f"{self.path} has the column {twice!r} twice: rename one of them")
        begin = lines.at
        for row in reader:
            if row:
                yield begin
            begin = lines.at

    @staticmethod
    def _raw(lines: _Lines) -> Iterator[tuple[int, bytes]]:
        """Lines as bytes: one that is not UTF-8 costs no other."""
        while line := lines.file.readline(LONGEST):
            if len(line) >= LONGEST:
                raise UserError(f"{lines.path} has a line of more than {LONGEST:,} bytes")
            begin, lines.at = lines.at, lines.at + len(line)
            yield begin, line

    def row(self, place: int) -> dict[str, Any]:
        """A row's values by column; of plain lines the line under the name "".

        Raises:
            ValueError: it is broken: says how.
        """
        with opened(self.path, _CURE) as file:
            lines = _Lines(file, self.path, int(self.begins[place]))
            try:
                if self.form is not None:
                    return self._fields(next(csv.reader(lines, **self.form)))
                line = next(lines).strip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"it is not UTF-8 (byte {error.start} of the line)") from None
        if self.plain:
            return {"": line}
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError("it is no valid JSON: JSON Lines have one object a line") from None
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object: JSON Lines have one object a line")
        return values

    def _fields(self, fields: list[str]) -> dict[str, Any]:
        assert self.header is not None
        if len(fields) != len(self.header):
            raise ValueError("it has not as many fields as the header")
        return dict(zip(self.header, fields, strict=True))

    def columns(self) -> list[str]:
        """The columns, of JSON Lines those of the first row that can be read."""
        if self.header is not None:
            return self.header
        for place in range(min(self.count, 64)):
            try:
                return [str(name) for name in self.row(place)]
            except ValueError:
                continue
        return []

    def require(self, column: str, option: str) -> None:
        """Refuses a table without a column.

        Raises:
            UserError: names those that are there.
        """
        there = self.columns()
        if column not in there and not self.plain:
            raise UserError(
                f"{self.path} has no column {column!r} (it has {', '.join(there[:8]) or 'none'})."
                f"{nearest(column, there, prefix='')} Name yours with {option}"
            )


class TextRows(Inputs):
    """Texts in a table's rows.

    Args:
        path: of the table.
        wanted: its columns.

    Raises:
        UserError: it cannot be read, has no row, or no such column.
    """

    kind, column = "text", "id"

    def __init__(self, path: Path, wanted: Wanted) -> None:
        self.rows, self.wanted, self.root, self.notes = Rows(path), wanted, str(path), []
        self.samples = self.rows.count
        if not self.samples:
            raise UserError(f"{path} has no texts: add some")
        self.rows.require(wanted.text, "--text_column")
        if wanted.pair != Wanted().pair:  # by its usual name it need not be there
            self.rows.require(wanted.pair, "--pair_column")

    def read(self, place: int) -> Input:
        """See `Inputs`."""
        name = str(place)
        try:
            values = self.rows.row(place)
            if self.rows.plain:
                return Input(name, Text(values[""], None))
            key = values.get(self.wanted.key)
            name = name if key in (None, "") else str(key)
            return Input(name, self._text(values))
        except (ValueError, UserError, OSError) as error:
            return broken(name, error)

    def _text(self, values: dict[str, Any]) -> Text:
        text, pair = values.get(self.wanted.text), values.get(self.wanted.pair)
        for column, value in ((self.wanted.text, text), (self.wanted.pair, pair)):
            if not isinstance(value, str) and not (value is None and column == self.wanted.pair):
                kind = "missing" if value is None else f"{type(value).__name__}, no text"
                raise ValueError(f"{column!r} is {kind}")
        assert isinstance(text, str)
        return Text(text, pair)

    def digest(self) -> str:
        """See `Inputs`: of the file, which was read as a whole to find its rows, and its columns.

        Not of its path: tables of equal size are told apart, and one written anew goes on.
        """
        with opened(self.rows.path, _CURE) as file:
            digest = hashlib.file_digest(file, "sha256")
        digest.update(repr(tuple(self.wanted)).encode())
        return digest.hexdigest()


def listed(path: Path, wanted: Wanted) -> Files:
    """The pictures that a table's column, or a file's lines, name; relative to its folder.

    Raises:
        UserError: it cannot be read, has no row, or no such column.
    """
    rows = Rows(path)
    if not rows.count:
        raise UserError(f"{path} names no pictures: add a path a line")
    rows.require(wanted.path, "--path_column")
    names = []
    for place in range(rows.count):
        try:
            value = rows.row(place).get("" if rows.plain else wanted.path)
        except ValueError as error:
            raise UserError(f"{path} row {place + 1}: {error}: correct the file") from None
        names.append(value.strip() if isinstance(value, str) else "")
    return Files(str(path), [_place(path.parent, name) for name in names], names)


def _place(folder: Path, name: str) -> Path:
    place = folder / name
    if "\\" in name and not place.exists():  # written on Windows
        return folder / name.replace("\\", "/")
    return place
