"""Rows of results -> a table: CSV, JSON Lines or Parquet, by the file's suffix."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from selfdistill.data.errors import UserError
from selfdistill.data.files import fresh, fsync

#: A column's values: text, a number, several texts, several numbers, so many fp32 numbers.
Kind = Literal["text", "number", "count", "texts", "numbers", "vector", "vectors"]
Columns = dict[str, Kind]
Row = dict[str, Any]

SUFFIXES = (".csv", ".jsonl", ".parquet")


def check(out: Path, suffixes: tuple[str, ...] = SUFFIXES, *, overwrite: bool = False) -> None:
    """Refuses an output before any work: there already, of no known kind, in no writable folder.

    Raises:
        UserError: says why.
    """
    if out.suffix.lower() not in suffixes:
        raise UserError(f"{out} ends in none of {', '.join(suffixes)}: name the output so")
    if out.is_file() and not overwrite:
        raise UserError(f"{out} is there: --overwrite replaces it, or name another file")
    if out.suffix.lower() == ".parquet":
        try:
            import pyarrow  # noqa: F401 - a few seconds; an hour of work without it would be lost
        except ImportError:
            raise UserError(
                f"{out} needs the package pyarrow, which is not installed here:"
                " pip install selfdistill[parquet], or name a .csv or .jsonl"
            ) from None
    make(out.parent)


def make(folder: Path) -> None:
    """Makes a folder to write to, unless it is there.

    Raises:
        UserError: it cannot be made, or may not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): name another") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} may not be written to: name another")


@contextmanager
def replacing(out: Path, mode: str) -> Iterator[IO[Any]]:
    """A file that takes the place of `out` once it is whole."""
    draft = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with fresh(draft, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, out)
        fsync(out.parent)
    finally:
        draft.unlink(missing_ok=True)


def write(out: Path, columns: Columns, blocks: Iterable[list[Row]]) -> None:
    """Writes a table, whole or not at all.

    Args:
        out: its file; one that is there is replaced.
        columns: names and kinds, in order; what a row lacks is empty.
        blocks: rows, some at a time.
    """
    writers: dict[str, Callable[[Path, Columns, Iterable[list[Row]]], None]] = {
        ".csv": _csv,
        ".jsonl": _jsonl,
        ".parquet": _parquet,
    }
    writers[out.suffix.lower()](out, columns, blocks)


def _csv(out: Path, columns: Columns, blocks: Iterable[list[Row]]) -> None:
    with replacing(out, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for rows in blocks:
            writer.writerows([_cell(row.get(name)) for name in columns] for row in rows)


def _cell(value: Any) -> Any:
    return ";".join(map(str, value)) if isinstance(value, list) else value


def _jsonl(out: Path, columns: Columns, blocks: Iterable[list[Row]]) -> None:
    with replacing(out, "w") as file:
        for rows in blocks:
            for row in rows:
                whole = {name: row.get(name) for name in columns}
                file.write(json.dumps(whole, ensure_ascii=False) + "\n")


def _parquet(out: Path, columns: Columns, blocks: Iterable[list[Row]]) -> None:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    kinds = {
        "text": pyarrow.string(),
        "number": pyarrow.float64(),
        "count": pyarrow.int64(),
        "texts": pyarrow.list_(pyarrow.string()),
        "numbers": pyarrow.list_(pyarrow.float64()),
        "vector": pyarrow.list_(pyarrow.float32()),
        "vectors": pyarrow.list_(pyarrow.list_(pyarrow.float32())),
    }
    schema = pyarrow.schema([(name, kinds[kind]) for name, kind in columns.items()])
    with replacing(out, "wb") as file, ParquetWriter(file, schema) as writer:
        for rows in blocks:
            whole = [{name: row.get(name) for name in columns} for row in rows]
            writer.write_table(pyarrow.Table.from_pylist(whole, schema))
