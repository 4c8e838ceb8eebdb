"""Files that strangers may have written -> values of the right types, or one line that says why.

JSON, TOML and numpy's tables are read here and nowhere else: sizes are looked at before anything is
read, numbers are bounded, nothing is unpickled, and what fails names file, field and cure.
"""

import io
import json
import math
import mmap
import os
import re
import tokenize
import tomllib
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import pydantic
from numpy.typing import NDArray

from selfdistill.data.errors import UserError, printable
from selfdistill.data.files import LARGEST, opened, read

#: What a number stays below: the integers that JSON's readers all keep exact.
BOUND = 2**53

Count = Annotated[int, pydantic.Field(ge=0, lt=BOUND)]
Hash = Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]
Finite = Annotated[float, pydantic.Field(allow_inf_nan=False)]
T = TypeVar("T")

_AGAIN = "fetch it again"
# What Python's own parser, which numpy reads headers by, raises on them.
_HEADER_ERRORS = (
    *(ValueError, TypeError, SyntaxError, RecursionError, MemoryError, EOFError),
    tokenize.TokenError,
)
_LONGEST_HEADER = 10 + 2**16  # of numpy's format 1.0: its length has two bytes
_DEEPEST = 64  # what reads and writes such values calls itself for each level


class Record(pydantic.BaseModel):
    """A foreign file's content: "3" is no number, 1 no truth; unknown fields are passed over."""

    model_config = pydantic.ConfigDict(strict=True, frozen=True)


def checked(kind: Any, value: object, place: object, cure: str = _AGAIN) -> Any:
    """A value of the type that it should have.

    Args:
        kind: A `Record`, or any type that pydantic knows.
        value: What stands there.
        place: The file, for the message.
        cure: What the user can do.

    Returns:
        The value; a `Record` where `kind` is one.

    Raises:
        UserError: It is of another type: names the field.
    """
    own = isinstance(kind, type) and issubclass(kind, Record)  # says itself how strict it is
    try:
        return pydantic.TypeAdapter(kind).validate_python(value, strict=None if own else True)
    except pydantic.ValidationError as error:
        raise UserError(f"{place}: {_first(error)}: {cure}") from None
    except RecursionError:
        raise UserError(f"{place} is nested too deeply: {cure}") from None


def _first(error: pydantic.ValidationError) -> str:
    """Field and fault of the first thing that is wrong."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = printable(".".join(map(str, first["loc"])))[:100]
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _refuse_depth(value: object) -> None:
    """Raises RecursionError where lists and objects lie deeper in one another than any of ours."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(_DEEPEST):
        inner = (v.values() if isinstance(v, dict) else v for v in level)
        level = [one for many in inner for one in many if isinstance(one, (dict, list))]
        if not level:
            return
    raise RecursionError


def _shown(error: Exception) -> str:
    return printable(" ".join(str(error).split()))[:200]


def from_json(content: bytes | str, place: object, cure: str = _AGAIN) -> Any:
    """What JSON says.

    Args:
        content: UTF-8.
        place: The file, for the message.
        cure: What the user can do.

    Returns:
        Plain values. Their strings can be written as UTF-8.

    Raises:
        UserError: It is no JSON, nested too deeply, or has half a surrogate pair.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        value = json.loads(text)
        if re.search(r"\\u[dD]", text):
            json.dumps(value, ensure_ascii=False).encode()
        _refuse_depth(value)
    except RecursionError:
        raise UserError(f"{place}: not valid JSON (nested too deeply): {cure}") from None
    except ValueError as error:
        raise UserError(f"{place}: not valid JSON ({_shown(error)}): {cure}") from None
    return value


def from_toml(content: bytes, place: object, cure: str = _AGAIN) -> dict[str, Any]:
    """What TOML says.

    Raises:
        UserError: See `from_json`.
    """
    try:
        value = tomllib.loads(content.decode("utf-8"))
        _refuse_depth(value)
        return value
    except RecursionError:
        raise UserError(f"{place}: not valid TOML (nested too deeply): {cure}") from None
    except ValueError as error:
        raise UserError(f"{place}: not valid TOML ({_shown(error)}): {cure}") from None


def _file(path: Path, parse: Callable[[bytes, object, str], Any], cure: str, most: int) -> Any:
    """A file's content.

    Raises:
        FileNotFoundError: There is none.
        UserError: It cannot be read, or is not what it should be.
    """
    return parse(read(path, cure, most), path, cure)


def read_json(path: Path, cure: str = _AGAIN, most: int = LARGEST) -> Any:
    """A file of JSON; see `from_json` and `data.files.read`."""
    return _file(path, from_json, cure, most)


def read_object(path: Path, cure: str = _AGAIN, most: int = LARGEST) -> dict[str, Any]:
    """A file of one JSON object; see `read_json`."""
    value = read_json(path, cure, most)
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object: {cure}")
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines that we wrote, up to the first that is none."""
    found = []
    text = read(path, "remove it").decode("utf-8", "replace")
    for line in text.split("\n")[:-1]:
        try:
            record = checked(dict[str, Any], from_json(line, path), path)
            json.dumps(record, allow_nan=False)  # as it was written
            found.append(record)
        except (UserError, ValueError):
            break
    return found


def read_toml(path: Path, cure: str = _AGAIN, most: int = LARGEST) -> dict[str, Any]:
    """A file of TOML; see `from_toml` and `data.files.read`."""
    found: dict[str, Any] = _file(path, from_toml, cure, most)
    return found


def read_table(
    path: Path, dtype: Any, shape: tuple[int, ...], cure: str, place: object = None
) -> NDArray[Any]:
    """A table of numbers in numpy's format (.npy), memory-mapped.

    Its header is compared with what is wanted, and with the file's size, before anything is mapped.

    Args:
        path: Of the file.
        dtype: Of its numbers.
        shape: Of the table.
        cure: What the user can do.
        place: What the file is called in messages; by default its path.

    Returns:
        The table, read-only.

    Raises:
        FileNotFoundError: There is none.
        UserError: It is another one, broken, or cut short.
    """
    with opened(path, cure) as file:
        return mapped(file, dtype, shape, cure, place or path)


def mapped(
    file: BufferedReader, dtype: Any, shape: tuple[int, ...], cure: str, place: object
) -> NDArray[Any]:
    """The same of a file that is open; the file may be closed then.

    Its position is neither used nor moved: processes that were handed one descriptor share it, and
    would move it under each other.

    Raises:
        UserError: It is another one, broken, or cut short.
    """
    wanted = np.dtype(dtype)
    try:
        head = io.BytesIO(os.pread(file.fileno(), _LONGEST_HEADER, 0))
        version = np.lib.format.read_magic(head)
        if version != (1, 0):
            raise ValueError(f"version {version} of the format, not (1, 0)")
        found, fortran, kind = np.lib.format.read_array_header_1_0(head)
        begin, size = head.tell(), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{place} cannot be read ({error.strerror}): {cure}") from None
    except _HEADER_ERRORS as error:
        raise UserError(f"{place} cannot be read as a table ({_shown(error)}): {cure}") from None
    if (found, kind, fortran) != (shape, wanted, False):
        raise UserError(
            f"{place} is {kind} {list(found)}, where {wanted} {list(shape)} is wanted: {cure}"
        )
    if size != begin + math.prod(shape) * wanted.itemsize:
        raise UserError(f"{place} has {size} bytes, which is not what its header says: {cure}")
    if size == begin:  # nothing cannot be mapped
        return np.zeros(shape, wanted)
    pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    return np.frombuffer(pages, wanted, offset=begin).reshape(shape)
