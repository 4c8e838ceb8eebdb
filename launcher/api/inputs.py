"""What is given to a function of the Python interface -> what its command takes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from selfdistill.data.errors import UserError

if TYPE_CHECKING:
    from selfdistill.launcher.api.run import Run

Place = str | os.PathLike[str]
#: Of a model; a table (pandas.DataFrame) is one of the iterables.
Inputs = Place | Iterable[Place]

#: Options that name a side, or HEIGHTxWIDTH.
_SIZES = ("size", "image_size")
_TABLE = "a DataFrame"


def place_of(value: Any, name: str) -> Place:
    """A place on the disk, or an address.

    Args:
        value: that was given.
        name: of the argument.

    Raises:
        UserError: it is something in memory.
    """
    if isinstance(value, str | os.PathLike):
        return value
    what = _named(value)
    if what == _TABLE:
        raise UserError(
            f"{name} is {what}: write it with df.to_csv('set.csv', index=False) and give that file"
        )
    raise UserError(f"{name} is {what}: give its path")


def plain(value: Any, name: str = "") -> Any:
    """An option's value without numpy, and two sides as HEIGHTxWIDTH.

    Args:
        value: that was given.
        name: of the option.
    """
    if isinstance(value, Mapping):
        return {inner: plain(one, str(inner)) for inner, one in value.items()}
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return value
    value = [plain(one) for one in value]
    if name.rpartition(".")[2] in _SIZES and len(value) == 2:
        return "x".join(map(str, value))
    return value


class Listed:
    """Inputs in memory, written as a table that a command reads.

    Args:
        inputs: paths or texts, or a DataFrame with a column of them.
        model: for which they are.
        options: of the command, which may name the columns.

    Attributes:
        given: paths or texts as they were given.
        index: of a Series or a DataFrame; None of a list.

    Raises:
        UserError: they are of the wrong kind, or there is none.
    """

    def __init__(self, inputs: Any, model: Place | Run, options: Mapping[str, Any]) -> None:
        from selfdistill.engine.inference.model import kind_of

        what = _named(inputs)
        if not isinstance(inputs, Iterable) or what == _PICTURE or isinstance(inputs, _WHOLE):
            raise UserError(f"inputs is {what}: {_cure(what)}")
        self.kind = kind_of(os.fspath(model))
        self.pairs: list[Any] = []
        self.index = getattr(inputs, "index", None) if hasattr(inputs, "iloc") else None
        self.given: list[Any] = self._columns(inputs, options) if what == _TABLE else list(inputs)
        if not self.given:
            raise UserError("inputs is empty: give a path or a text")
        for number, one in enumerate(self.given):
            self._check(number, one)

    def _columns(self, table: Any, options: Mapping[str, Any]) -> list[Any]:
        """Those of a DataFrame that the model takes."""
        pair = options.get("pair_column", "text_pair")
        if self.kind == "text" and "pair_column" in options and pair not in table.columns:
            raise UserError(f"inputs is a DataFrame without a column {pair}: correct pair_column")
        if self.kind == "text" and pair in table.columns:
            self.pairs = list(table[pair])
        return list(table[_column(table, self.kind, options)])

    def _check(self, number: int, one: Any) -> None:
        if not isinstance(one, str | os.PathLike):
            what = _named(one)
            cure = f": {_cure(what)}" if what == _PICTURE else ", neither a path nor a text"
            raise UserError(f"inputs[{number}] is {what}{cure}")
        if self.kind == "image" and os.path.isdir(one):
            raise UserError(
                f"inputs[{number}] is the folder {os.fspath(one)}: a list takes files; give one"
                " folder by itself"
            )

    def write(self, path: Path, options: dict[str, Any]) -> None:
        """Writes the table, of which the options then name the columns.

        Args:
            path: .jsonl.
            options: of the command; changed in place.
        """
        for name in ("path_column", "text_column", "pair_column"):
            options.pop(name, None)
        with path.open("w", encoding="utf-8") as file:
            for number, one in enumerate(self.given):
                row = {"path": _whole(one)} if self.kind == "image" else {"text": os.fspath(one)}
                if self.pairs and isinstance(self.pairs[number], str):  # else it is missing
                    row["text_pair"] = self.pairs[number]
                file.write(json.dumps(row) + "\n")

    def as_given(self, names: Iterable[str]) -> list[Any]:
        """Paths of the command's table as they were given.

        Args:
            names: some of them, in the order of the inputs.
        """
        if self.kind == "text":
            return list(names)
        rest = iter(self.given)
        return [next((one for one in rest if _written(one) == name), name) for name in names]

    def by_name(self) -> dict[str, Any]:
        """What was given, by the paths of the command's table."""
        found = {} if self.kind == "text" else {_written(one): one for one in self.given}
        return found


_PICTURE = "a picture in memory"
#: They could be iterated over, and would give nonsense.
_WHOLE = (bytes, bytearray, Mapping)


def _named(value: Any) -> str:
    """What a value is, in a few words."""
    if hasattr(value, "columns") and hasattr(value, "shape"):
        return _TABLE
    if hasattr(value, "getpixel"):
        return _PICTURE
    if getattr(value, "ndim", 0):
        return f"an array of shape {tuple(value.shape)}"
    if value is None or isinstance(value, int | float | complex):
        return repr(value)
    return f"a {type(value).__name__}"


def _cure(what: str) -> str:
    return "give its path" if what == _PICTURE else "give a path, or a list of paths or texts"


def _column(table: Any, kind: Literal["image", "text"], options: Mapping[str, Any]) -> str:
    """The column of inputs of a DataFrame."""
    option, usual = ("path_column", "path") if kind == "image" else ("text_column", "text")
    column = str(options.get(option, usual))
    if column not in table.columns:
        raise UserError(f"inputs is a DataFrame without a column {column}: give df['...']")
    return column


def _whole(path: Place) -> str:
    return os.path.abspath(path)


def _written(path: Place) -> str:
    """A path as the command's table has it."""
    return _whole(path).strip().encode("utf-8", "backslashreplace").decode()
