"""pandas, which only the Python interface needs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfdistill.data.errors import UserError

if TYPE_CHECKING:
    import pandas

#: Columns of tables that hold words, whatever these look like.
_WORDS = re.compile(
    r"path|id|name|neighbour|text|text_pair|class(es)?|class_\d+|probabilities|error"
)


def frames() -> Any:
    """The module pandas.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise UserError(
            "pandas, in whose tables results come, is not installed: pip install pandas"
        ) from None
    return pandas


def table(rows: list[dict[str, Any]], columns: list[str]) -> pandas.DataFrame:
    """Rows as a table that has its columns even where there is no row."""
    found: pandas.DataFrame = frames().DataFrame(rows, columns=columns)
    return found


def objects(values: list[Any]) -> pandas.Series:
    """A column whose values are those objects, strings or paths."""
    found: pandas.Series = frames().Series(values, dtype="str" if _all_str(values) else "object")
    return found


def _all_str(values: list[Any]) -> bool:
    return all(isinstance(one, str) for one in values)


def read(path: Path) -> pandas.DataFrame:
    """A table that a command wrote.

    Args:
        path: .csv, .jsonl or .parquet.
    """
    found: pandas.DataFrame
    kind = path.suffix.lower()
    if kind == ".jsonl":
        # pandas' own reader would make numbers and dates of texts.
        with path.open(encoding="utf-8") as file:
            return frames().DataFrame([json.loads(line) for line in file])
    if kind == ".parquet":
        found = frames().read_parquet(path)
        return found
    names = list(frames().read_csv(path, nrows=0).columns)
    words = [name for name in names if _WORDS.fullmatch(name)]
    found = frames().read_csv(
        path,
        dtype=dict.fromkeys(words, "str"),
        keep_default_na=False,  # a class may be called NA
        na_values={name: [""] for name in names if name not in words},
    )
    return found
