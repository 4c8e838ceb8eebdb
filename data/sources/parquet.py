"""Parquet files, as hubs keep data sets: unpacked to images with a list, or to JSON Lines.

    data/train-00000-of-00002.parquet    the split stands before the first dash; or one file alone
    train/data-00000-of-00001.arrow      images that `datasets` saved to disk, in a folder a split

Images are a column of bytes, or of records of bytes and path. Numbers of classes become names where
the file tells them (`datasets` writes them into the schema).
"""

import csv
import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from selfdistill.data import records
from selfdistill.data.cli import nearest
from selfdistill.data.errors import UserError, printable
from selfdistill.data.formats import images
from selfdistill.data.formats.strays import is_stray
from selfdistill.data.sources.samples import Columns
from selfdistill.data.sources.several import LISTED
from selfdistill.data.splits import ALIASES

if TYPE_CHECKING:
    import pyarrow

_ROWS = 64  # that are held at a time
_Batches = Callable[[list[str]], Iterator["pyarrow.RecordBatch"]]


class _Rows(NamedTuple):
    """A file, its schema, its rows, and its split ("" for none)."""

    path: Path
    schema: "pyarrow.Schema"
    batches: _Batches
    split: str


def _saved(root: Path) -> list[Path]:
    """The files of a folder that `datasets.save_to_disk` wrote; texts it reads itself."""
    if not any((root / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return []
    found, cure = [], "save the data set again"
    for state in sorted((*root.glob("state.json"), *root.glob("*/state.json"))):
        if is_stray(state.relative_to(root)):
            continue
        # What else lies there is none of it: map() leaves cache-*.arrow, with the samples again.
        named = records.read_object(state, cure).get("_data_files", [])
        for one in records.checked(list[dict[str, Any]], named, state, cure):
            path = state.parent / Path(str(one.get("filename"))).name
            if not path.is_file():
                raise UserError(f"{path} is missing, which {state} names: {cure}")
            found.append(path)
    return found


def _files(root: Path) -> list[Path]:
    """The files of a source with tables; none where it is another one."""
    if root.is_file():
        return [root] if root.suffix.lower() == ".parquet" else []
    for folder in (root, root / "data"):
        inside = list(folder.iterdir()) if folder.is_dir() else []
        found = [p for p in inside if p.suffix.lower() == ".parquet" and p.is_file()]
        # img2dataset leaves tables beside its tars
        if found and not any(p.suffix.lower() == ".tar" for p in inside):
            return sorted(p for p in found if not is_stray(p.name))
    return []


def _splits(root: Path, files: list[Path]) -> list[str]:
    """The split of each file; "" for all where none is named after one."""
    named = [path if path.suffix != ".arrow" else path.parent for path in files]
    found = [
        "" if path == root and path.is_dir() else ALIASES.get(_first_word(path.name), "")
        for path in named
    ]
    if any(found) and not all(found):
        lost = files[found.index("")]
        raise UserError(f"{lost} is named after no split, as others are: rename or remove it")
    return found


def _first_word(name: str) -> str:
    return re.split(r"[-_.]", name)[0].lower()


@contextmanager
def opened(root: Path, scratch: Path, columns: Columns) -> Iterator[Path]:
    """What to read in place of Parquet files: a list of images, or JSON Lines, in a new folder.

    Args:
        root: What the user named.
        scratch: Where that folder is made: it holds all images, and goes in the end.
        columns: Names of the columns; that of paths may be the column of images.

    Yields:
        The file; `root` itself where there are no Parquet files.

    Raises:
        UserError: They cannot be read, or have neither images nor texts.
    """
    files, saved = _files(root), _saved(root)
    if not files and not saved:
        yield root
        return
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        if not files:
            yield root
            return
        raise UserError(
            f"{files[0]} needs the package pyarrow, which is not installed here:"
            " pip install selfdistill[parquet]"
        ) from None
    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".extracted-", dir=scratch))
    try:
        try:
            made = root
            if files or _has_images(saved[0]):
                made = _unpack(files or saved, _splits(root, files or saved), folder, columns)
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError, LookupError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            why = printable(" ".join(str(error).split()))[:200]
            raise UserError(f"{root} cannot be read ({why}): fetch it again") from None
        yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _table(path: Path) -> Iterator[tuple["pyarrow.Schema", _Batches]]:
    """A file's schema, and its rows by the columns that are wanted, a few at a time."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    if path.suffix == ".arrow":
        with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as reader:

            def batches(columns: list[str]) -> Iterator["pyarrow.RecordBatch"]:
                for batch in reader:
                    chosen = batch.select(columns)
                    yield from (chosen.slice(at, _ROWS) for at in range(0, len(chosen), _ROWS))

            yield reader.schema, batches
    else:
        with ParquetFile(path) as table:
            yield table.schema_arrow, lambda columns: table.iter_batches(_ROWS, columns=columns)


def _has_images(path: Path) -> bool:
    with _table(path) as (schema, _):
        return bool(_binary(schema))


def _unpack(files: list[Path], splits: list[str], folder: Path, columns: Columns) -> Path:
    """Writes images and their list, or JSON Lines."""
    with _table(files[0]) as (first, _):
        image = _image(files[0], first, columns)
    target = folder / ("images.jsonl" if image is None else "images.csv")
    with target.open("w", newline="", encoding="utf-8") as out:
        number = 0
        for path, split in zip(files, splits, strict=True):
            with _table(path) as (schema, batches):
                if schema.names != first.names:
                    raise UserError(f"{path} has other columns than {files[0]}: remove one of them")
                rows = _Rows(path, schema, batches, split)
                number = _write(rows, image, number, folder, out, columns)
    if not number:
        raise UserError(f"{files[0]} has no rows: add some")
    return target


def _binary(schema: "pyarrow.Schema") -> list[str]:
    """Columns that may be of images."""
    import pyarrow.types as types

    return [
        field.name
        for field in schema
        if types.is_binary(field.type)
        or types.is_large_binary(field.type)
        or (types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
    ]


def _image(path: Path, schema: "pyarrow.Schema", columns: Columns) -> str | None:
    """The column of images; None where the table holds texts.

    Raises:
        UserError: There are several, or neither.
    """
    if columns.names_text and columns.text in schema.names:
        return None
    found = _binary(schema)
    if columns.path in found:
        return columns.path
    if columns.path != Columns().path:
        raise UserError(
            f"{path} has no column {columns.path!r} of images"
            f" (it has {', '.join(map(printable, schema.names))})."
            + nearest(columns.path, schema.names, prefix="")
        )
    if len(found) > 1:
        raise UserError(
            f"{path} has several columns of images ({', '.join(map(printable, found))}): name one"
            " with --path_column"
        )
    if not found and columns.text not in schema.names:
        raise UserError(
            f"{path} has neither images nor a column {columns.text!r} of texts (it has"
            f" {', '.join(map(printable, schema.names))}): name yours with --text_column"
        )
    return found[0] if found else None


def _class_names(path: Path, schema: "pyarrow.Schema") -> dict[str, list[str]]:
    """Names of classes by column, as `datasets` writes them."""
    content = (schema.metadata or {}).get(b"huggingface")
    if content is None:
        return {}
    known = records.from_json(content, f"{path}: what it says of its columns")
    for key in ("info", "features"):
        known = known.get(key) if isinstance(known, dict) else None
    found = {}
    for name, kind in (known if isinstance(known, dict) else {}).items():
        # Of a list of classes: [{...}], or {"feature": {...}, "_type": "Sequence" or "List"}.
        kind = kind[0] if isinstance(kind, list) and len(kind) == 1 else kind
        inner = kind.get("feature") if isinstance(kind, dict) else None
        kind = inner if isinstance(inner, dict) else kind
        names = kind.get("names") if isinstance(kind, dict) else None
        if isinstance(names, list) and all(isinstance(one, str) for one in names):
            found[name] = names
    return found


def _plain_columns(schema: "pyarrow.Schema", label: str) -> list[str]:
    """Columns of texts and numbers, and the labels, which may be lists; others say nothing here."""
    import pyarrow.types as types

    texts = (types.is_string, types.is_large_string, types.is_string_view)
    kinds = (*texts, types.is_integer, types.is_floating)
    more = (types.is_boolean, types.is_dictionary)
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    return [
        one.name
        for one in schema
        if any(kind(one.type) for kind in (*kinds, *more))
        or (one.name == label and any(kind(one.type) for kind in lists))
    ]


def _plain(path: Path, row: int, value: Any, names: list[str] | None) -> Any:
    """A value as text or a number; classes by name; None for what is neither, nor is NaN one."""
    if isinstance(value, list):
        return [_plain(path, row, one, names) for one in value]
    if isinstance(value, float) and math.isnan(value):  # how pandas writes that there is none
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if names is None or not isinstance(value, int) or isinstance(value, bool) or value < 0:
        return value if isinstance(value, str | int | float) else None
    if value >= len(names):
        raise UserError(
            f"{path} row {row}: class {value} is outside the {len(names)} that it names: fetch it"
            " again"
        )
    return names[value]


def _cell(value: Any) -> Any:
    """A value in a CSV; a list as `data.sources.several` reads it."""
    if isinstance(value, list):
        return "".join(f"{LISTED}{one}" for one in value) or LISTED
    return "" if value is None else value


def _write(
    rows: _Rows, image: str | None, number: int, folder: Path, out: IO[str], columns: Columns
) -> int:
    """One file's rows; returns how many there are with those before."""
    path, schema, batches, split = rows
    names = _class_names(path, schema)
    plain = _plain_columns(schema, columns.label)
    own = {image, columns.path if image else None, "split" if split else None}
    plain = [one for one in plain if one not in own]
    writer, row = csv.writer(out), 0
    for batch in batches([*([image] if image else []), *plain]):
        for values in batch.to_pylist():
            shown = {key: _plain(path, row, values[key], names.get(key)) for key in plain}
            if image is None:
                line = shown | ({"split": split} if split else {})
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
            else:
                content = values[image]
                content = content.get("bytes") if isinstance(content, dict) else content
                if not isinstance(content, bytes):
                    raise UserError(
                        f"{path} row {row} has no bytes of its image, perhaps only a path: write"
                        " the images into the table, or list them in a CSV"
                    )
                if number == 0:  # an empty file before may know no types, and so not these columns
                    writer.writerow([columns.path, *plain, *(["split"] if split else [])])
                name = f"{number:08d}.{images.kind_of(content) or 'img'}"
                (folder / name).write_bytes(content)
                cells = [_cell(value) for value in shown.values()]
                writer.writerow([name, *cells, *([split] if split else [])])
            number, row = number + 1, row + 1
    return number
