"""Where texts come from: JSON Lines, CSV, TSV, plain lines, a saved folder of `datasets`."""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from selfdistill.data.cli import nearest
from selfdistill.data.errors import UserError, counted
from selfdistill.data.formats.images import SUFFIXES as IMAGES
from selfdistill.data.formats.strays import is_stray
from selfdistill.data.formats.texts import Text
from selfdistill.data.sources import several, tables
from selfdistill.data.sources.images import files_below
from selfdistill.data.sources.samples import (
    Columns,
    Row,
    Sample,
    Samples,
    Splits,
    Stream,
    grouped,
    listed,
)
from selfdistill.data.splits import ALIASES, DIVIDED

#: Files of texts by their extension; .csv may be a list of images as well.
JSONL = (".jsonl", ".ndjson")
SUFFIXES = (*JSONL, ".csv", ".tsv", ".txt")

#: Files by which `datasets.save_to_disk` is known.
_SAVED = ("dataset_dict.json", "state.json")

# What a row may belong to, "" where it does not say.
_OWNERS = (*DIVIDED, "")


class _Field(NamedTuple):
    """A row as it was read: where it stands, its values by column, the split of its file."""

    where: str
    values: dict[str, Any]
    split: str


def recognise(root: Path, columns: Columns) -> bool:
    """Whether a source holds texts.

    Args:
        root: What the user named.
        columns: Names of the columns.
    """
    if root.is_dir():
        if _is_saved(root):
            return True
        files = _split_files(root).values()
        # Sets of images come with train.txt and test.txt, the names of their files.
        lists = all(path.suffix.lower() == ".txt" for path in files)
        return bool(files) and not (lists and files_below(root, IMAGES)[0])
    suffix = root.suffix.lower()
    if suffix == ".csv" and root.is_file():
        header, _ = tables.read(root)
        return columns.text in header and (columns.path not in header or columns.names_text)
    return suffix in SUFFIXES and suffix != ".csv" and root.is_file()


def find(
    root: Path,
    columns: Columns,
    *,
    unlabelled: bool = False,
    notes: list[str] | None = None,
) -> Splits:
    """The texts of a file or a folder that `recognise` knows.

    Args:
        root: File, folder of {train,val,test}.{jsonl,csv,tsv,txt}, or folder of `datasets`.
        columns: Names of the columns.
        unlabelled: Leave labels away; the file may then be larger than memory.
        notes: Gets a line for each thing that was passed over.

    Returns:
        Per split its samples and classes; the split "" where the source is not divided.

    Raises:
        UserError: The source cannot be read or contradicts itself.
    """
    files = _files(root)
    if notes is not None and root.is_dir() and not _is_saved(root):
        others = [
            path.name
            for path in sorted(root.iterdir())
            if path.suffix.lower() in SUFFIXES and path not in files.values() and path.is_file()
        ]
        if others := [name for name in others if not is_stray(name)]:
            notes.append(
                f"note: left out: {counted(len(others), 'file', 'files')} not named after a split,"
                f" such as {others[0]}"
            )
    plain = all(path.suffix.lower() == ".txt" for path in files.values())
    if unlabelled or plain:
        return _streams(files, columns)
    rows, there = [], dict[str, None]()
    for split, path in files.items():
        for field in _fields(path, split, columns):
            rows.append(_labelled(field, columns))
            there |= dict.fromkeys(field.values)
    if not rows:
        raise UserError(f"{root} has no texts: add some")
    _refuse_twins(rows)
    several.check(rows, columns.separator, root)
    own = {columns.text, columns.pair, columns.label, columns.key, columns.group, "split"}
    if notes is not None and (ignored := [str(name) for name in there if name not in own]):
        notes.append(f"note: of {root.name} these columns are ignored: {', '.join(ignored[:20])}")
    return grouped(rows)


def find_extra(
    root: Path, columns: Columns, held: Collection[str] = (), notes: list[str] | None = None
) -> Samples:
    """All texts of a file or folder, without labels.

    Args:
        root: The file or folder.
        columns: Names of the columns.
        held: Groups of val and test, whose texts are left out.
        notes: Gets a line of how many these are.

    Raises:
        UserError: There are none.
    """
    if not root.exists():
        raise UserError(f"--unlabelled {root} does not exist: give a file of texts")
    if not recognise(root, columns):
        raise UserError(
            f"--unlabelled {root} holds no texts, as the source does: give a file"
            f" ({', '.join(SUFFIXES)}) with a column {columns.text!r}, or a folder of such"
        )
    left: Counter[str] = Counter()
    found = _streams(_files(root), columns, frozenset(held), left)
    if held and notes is not None:
        told = f"note: of {root.name} {left['held']} texts of groups in val or test are left out"
        lack = f"; {left['none']} have no {columns.group!r}, and may be of such"
        notes.append(told + (lack if left["none"] else ""))
    streams = [samples for samples, _ in found.values() if isinstance(samples, Stream)]
    lengths = sum(len(samples) for samples in streams)
    listing = " ".join(samples.digest() for samples in streams)
    return Stream(
        lambda: (make for stream in streams for make in stream.makers()), lengths, listing
    )


def has_pairs(splits: Splits) -> bool:
    """Whether any text is one of a pair."""
    return any(
        isinstance(sample.source, Text) and sample.source.pair is not None
        for samples, _ in splits.values()
        for sample in samples
    )


def _files(root: Path) -> dict[str, Path]:
    """What is read, by split; "" where it is not divided, or says so itself."""
    return {"": root} if root.is_file() or _is_saved(root) else _split_files(root)


def _is_saved(root: Path) -> bool:
    return root.is_dir() and any((root / name).is_file() for name in _SAVED)


def _split_files(root: Path) -> dict[str, Path]:
    """The files of a folder that are named after splits."""
    found: dict[str, Path] = {}
    for path in sorted(root.iterdir()):
        split = ALIASES.get(path.stem.lower())
        if path.suffix.lower() not in SUFFIXES or not path.is_file() or split is None:
            continue
        if split in found:
            raise UserError(f"{found[split]} and {path} are both the split {split!r}: remove one")
        found[split] = path
    return {s: found[s] for s in DIVIDED if s in found}


def _streams(
    files: dict[str, Path],
    columns: Columns,
    held: frozenset[str] = frozenset(),
    left: Counter[str] | None = None,
) -> Splits:
    """Texts without labels, read anew at each pass; of a file that is divided a stream a split.

    Those of groups in `held` are left out, and counted in `left`, as are those without a group.
    """

    def sample(number: int, field: _Field) -> Sample:
        return Sample(_key(field, columns, number), _text(field, columns), None, field.where)

    def pass_over(
        path: Path, split: str, owners: bytearray | None = None
    ) -> Iterator[Callable[[], Sample]]:
        for number, field in enumerate(_fields(path, split, columns)):
            group = field.values.get(str(columns.group)) if held else None
            if left is not None and owners is not None and held:
                left["none" if group in (None, "") else "held" if str(group) in held else ""] += 1
            if held and str(group) in held:
                continue
            if owners is not None:
                owners.append(_OWNERS.index(field.split))
            yield partial(sample, number, field)

    found: Splits = {}
    for split, path in files.items():
        makers, owners = partial(pass_over, path, split), bytearray()
        length, listing = listed(make() for make in makers(owners))
        if not length:
            raise UserError(f"{path} has no texts: add some")
        of = np.frombuffer(owners, np.uint8)
        for number in np.unique(of).tolist():
            found[_OWNERS[number]] = Stream(makers, length, listing, of == number), []
    return found


def _fields(path: Path, split: str, columns: Columns) -> Iterator[_Field]:
    suffix = path.suffix.lower()
    if path.is_dir():
        yield from _saved(path, columns)
    elif suffix in JSONL:
        yield from _json_lines(path, split)
    elif suffix == ".txt":
        for number, line in _lines(path):
            if line.strip():
                yield _Field(f"{path} line {number}", {columns.text: line}, split)
    else:
        _, rows = tables.read(path)
        for number, row in rows:
            where = f"{path} line {number}"
            yield _Field(where, row, split or tables.split_of(row, where))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines, numbered from 1; only a newline ends one, as in JSON Lines."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(tables.LONGEST), b""), 1):
                if len(line) >= tables.LONGEST:
                    raise UserError(
                        f"{path} line {number} has more than {tables.LONGEST:,} bytes: divide it"
                    )
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path} line {number} is not UTF-8 (byte {error.start + 1} of the line):"
                        " save the file in UTF-8"
                    ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be opened ({error.strerror}): check it") from None


def _json_lines(path: Path, split: str) -> Iterator[_Field]:
    for number, line in _lines(path):
        where = f"{path} line {number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{where} is no valid JSON ({error}): JSON Lines have one object a line"
            ) from None
        if not isinstance(values, dict):
            raise UserError(f"{where} is no JSON object: JSON Lines have one object a line")
        given = values.get("split")
        own = split or (tables.split_of({"split": given}, where) if isinstance(given, str) else "")
        yield _Field(where, values, own)


def _saved(path: Path, columns: Columns) -> Iterator[_Field]:
    """Rows of what `datasets.save_to_disk` wrote; class numbers become names."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{path} is a folder of the library datasets, which is not installed here:"
            " pip install datasets, or write it as JSON Lines (to_json)"
        ) from None
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be loaded: {' '.join(str(error).split())}") from None
    parts = loaded if isinstance(loaded, dict) else {"": loaded}
    for name, part in parts.items():
        split = ALIASES.get(name.lower(), "")
        if name and not split:
            raise UserError(f"{path}: split {name!r} is none of {', '.join(DIVIDED)}: rename it")
        feature = part.features.get(columns.label)
        feature = getattr(feature, "feature", feature)  # of a list
        feature = feature[0] if isinstance(feature, list) and feature else feature
        names = getattr(feature, "names", None)
        for number, row in enumerate(part):
            if names is not None:
                row = row | {columns.label: _by_number(row.get(columns.label), names)}
            yield _Field(f"{path}{f' {name}' if name else ''} row {number}", row, split)


def _by_number(label: Any, names: list[str]) -> Any:
    """The name of a class, or those of a list of classes; what is none as it is."""
    if isinstance(label, list):
        return [_by_number(one, names) for one in label]
    return names[label] if isinstance(label, int) and 0 <= label < len(names) else label


def _value(field: _Field, column: str, option: str) -> Any:
    if column not in field.values:
        there = [str(name) for name in field.values]
        hint = nearest(column, there, prefix="")
        raise UserError(
            f"{field.where} has no column {column!r} (it has {', '.join(there[:8]) or 'none'})."
            f"{hint} Name yours with {option}"
        )
    return field.values[column]


def _text(field: _Field, columns: Columns) -> Text:
    text = _value(field, columns.text, "--text_column")
    pair = field.values.get(columns.pair)
    if columns.pair != Columns().pair:
        pair = _value(field, columns.pair, "--pair_column")
    for column, value in ((columns.text, text), (columns.pair, pair)):
        if not isinstance(value, str) and not (value is None and column == columns.pair):
            raise UserError(
                f"{field.where}: {column!r} is {type(value).__name__}, no text: correct it"
            )
    return Text(text, pair)


def _key(field: _Field, columns: Columns, number: int) -> str:
    value = field.values.get(columns.key)
    return str(number) if value is None else str(value)


def _labelled(field: _Field, columns: Columns) -> Row:
    text = _text(field, columns)
    label = _value(field, columns.label, "--label_column")
    names: str | tuple[str, ...]
    if isinstance(label, list):
        names = several.listed(label, field.where)
    elif columns.separator is not None and isinstance(label, str):
        names = several.separated(label, columns.separator, field.where)
    else:
        names = _single(field, label)
    key = field.values.get(columns.key)
    group = _value(field, columns.group, "--group_column") if columns.group else None
    named = None if group in (None, "") else str(group)
    key = "" if key is None else str(key)
    return Row(field.split, field.where, key, text, names, named)


def _single(field: _Field, label: Any) -> str:
    """The name of a row's one class."""
    cure = "correct it, or pack without labels (--unlabelled)"
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # a table's way to write a number where others are missing
    if label is None or (isinstance(label, str) and not label.strip()):
        raise UserError(f"{field.where} has no label: {cure}")
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise UserError(
            f"{field.where}: its label is {type(label).__name__}, neither a name nor a number:"
            f" {cure}"
        )
    if isinstance(label, int) and label < 0:
        raise UserError(f"{field.where}: its label {label} stands for none: {cure}")
    return str(label).strip()


def _refuse_twins(rows: list[Row]) -> None:
    seen: dict[tuple[str, str], str] = {}
    for row in rows:
        if row.key and (row.split, row.key) in seen:
            raise UserError(
                f"{row.where}: the id {row.key!r} stands in {seen[row.split, row.key]} too:"
                " correct the file"
            )
        seen[row.split, row.key] = row.where
