"""Parquet files as inputs: a column of texts, of pictures' bytes, or of their paths."""

import hashlib
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from selfdistill.data.cli import nearest
from selfdistill.data.errors import UserError, printable
from selfdistill.data.formats.texts import Text
from selfdistill.data.inputs.base import Input, Inputs, broken
from selfdistill.data.inputs.tables import Wanted


class Table(Inputs):
    """The rows of one Parquet file, read a row group at a time.

    Args:
        path: of the file.
        kind: of what is wanted of it.
        wanted: its columns.

    Raises:
        UserError: it cannot be read, or has no such column.
    """

    def __init__(self, path: Path, kind: Literal["image", "text"], wanted: Wanted) -> None:
        try:
            import pyarrow
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise UserError(
                f"{path} needs the package pyarrow, which is not installed here:"
                " pip install selfdistill[parquet]"
            ) from None
        try:
            with ParquetFile(path) as table:
                schema, metadata = table.schema_arrow, table.metadata
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            why = printable(" ".join(str(error).split()))[:200]
            raise UserError(f"{path} cannot be read ({why}): fetch it again") from None
        self.path, self.kind, self.root, self.notes = path, kind, str(path), []
        self.wanted, self.samples = wanted, metadata.num_rows
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.main = self._main(schema.names, _binary(schema))
        self.column = "id"
        self._held: tuple[int, Any] | None = None
        more = (wanted.pair, wanted.key) if kind == "text" else (wanted.key,)
        self.columns = [self.main, *(name for name in more if name in schema.names)]

    def _main(self, names: list[str], pictures: list[str]) -> str:
        if self.kind == "image":
            column = self.wanted.path
            if column == Wanted().path and len(pictures) == 1:  # as packing takes it
                column = pictures[0]
            return self._required(column, "--path_column", names)
        if self.wanted.pair != Wanted().pair:  # by its usual name it need not be there
            self._required(self.wanted.pair, "--pair_column", names)
        return self._required(self.wanted.text, "--text_column", names)

    def _required(self, column: str, option: str, names: list[str]) -> str:
        if column not in names:
            there = ", ".join(map(printable, names[:8]))
            hint = nearest(column, names, prefix="")
            raise UserError(
                f"{self.path} has no column {column!r} (it has {there}).{hint} Name yours with"
                f" {option}"
            )
        return column

    def _group(self, number: int) -> Any:
        """A row group; the last one is held."""
        from pyarrow.parquet import ParquetFile

        if self._held is None or self._held[0] != number:
            with ParquetFile(self.path) as table:
                self._held = number, table.read_row_group(number, columns=self.columns)
        return self._held[1]

    def read(self, place: int) -> Input:
        """See `Inputs`; pictures have the path that stands beside their bytes, or the number."""
        group = int(np.searchsorted(self.starts, place, side="right")) - 1
        name = str(place)
        try:
            rows = self._group(group).slice(place - int(self.starts[group]), 1).to_pylist()
        except Exception as error:  # whatever pyarrow meets in a broken file
            return broken(name, error)
        values = rows[0]
        value = values[self.main]
        key = values.get(self.wanted.key)
        name = name if key in (None, "") else str(key)
        if self.kind == "text":
            if not isinstance(value, str):
                return broken(name, f"{self.main!r} is no text")
            pair = values.get(self.wanted.pair)
            return Input(name, Text(value, pair if isinstance(pair, str) else None))
        if isinstance(value, dict):
            told = value.get("path")
            name = name if key or not told else str(told)
            value = value.get("bytes")
        if isinstance(value, str):
            return self._file(value)
        return Input(name, value) if isinstance(value, bytes) else broken(name, "it has no bytes")

    def _file(self, name: str) -> Input:
        from selfdistill.data.inputs.files import Files

        return Files(self.root, [self.path.parent / name], [name]).read(0)

    def digest(self) -> str:
        """See `Inputs`: of where the file lies, its time, size and rows."""
        now = self.path.stat()
        place = (os.path.abspath(self.path), now.st_mtime_ns, now.st_size)
        told = (*place, self.starts.tolist(), self.columns)
        return hashlib.sha256(repr(told).encode()).hexdigest()


def _binary(schema: Any) -> list[str]:
    """Columns that may be of pictures' bytes, by themselves or in records."""
    import pyarrow.types as types

    return [
        field.name
        for field in schema
        if types.is_binary(field.type)
        or types.is_large_binary(field.type)
        or (types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
    ]
