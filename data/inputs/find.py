"""What a user named -> its inputs: files, folders, tables, packed sets, tars, standard input."""

import glob
import hashlib
import os
import sys
from pathlib import Path
from typing import Literal

from selfdistill.data.cli import nearest
from selfdistill.data.errors import UserError
from selfdistill.data.formats.texts import Text
from selfdistill.data.inputs import files, packed
from selfdistill.data.inputs.base import Input, Inputs
from selfdistill.data.inputs.tables import TextRows, Wanted, listed
from selfdistill.data.shards import tars
from selfdistill.data.sources.images import files_below
from selfdistill.data.sources.texts import JSONL

Kind = Literal["image", "text"]
Stdin = Literal["auto", "texts", "paths"]

#: Tables, of which a text model reads the texts and an image model the paths.
TABLES = (*JSONL, ".csv", ".tsv", ".txt")
_ARCHIVES = (".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".tbz2", ".txz", ".tzst")


class Lines(Inputs):
    """Texts that came by standard input, one a line; empty lines are none."""

    kind, column, root = "text", "id", "standard input"

    def __init__(self, lines: list[str]) -> None:
        self.lines, self.notes, self.samples = lines, [], len(lines)

    def read(self, place: int) -> Input:
        """See `Inputs`."""
        return Input(str(place), Text(self.lines[place], None))

    def digest(self) -> str:
        """See `Inputs`: of all texts."""
        return hashlib.sha256("\n".join(self.lines).encode(errors="replace")).hexdigest()


def find(
    source: str,
    kind: Kind,
    *,
    wanted: Wanted | None = None,
    split: str | None = None,
    stdin: Stdin = "auto",
) -> Inputs:
    """The inputs that a place holds, for a model of one kind.

    Args:
        source: A file, a folder of any shape, a pattern (photos/*.jpg), a table, a tar or a folder
            of such, a packed set or one of its splits, or "-" for standard input.
        kind: What the model takes.
        wanted: Names of a table's columns.
        split: Of a packed set.
        stdin: What comes by standard input; by default what the model takes.

    Raises:
        UserError: There is nothing, or of the other kind.
    """
    wanted = wanted or Wanted()
    found = _standard(kind, stdin) if source == "-" else _named(source, kind, wanted, split, stdin)
    if not found.samples:
        raise UserError(f"{source} has no rows: give inputs")
    return found


def _named(source: str, kind: Kind, wanted: Wanted, split: str | None, stdin: Stdin) -> Inputs:
    """What a place holds."""
    if stdin != "auto":
        raise UserError(f"--stdin says what standard input is: give - in place of {source}")
    found = packed.find(source, split)
    if split is not None and found is None:
        raise UserError(f"--split {split}: {source} is no packed set: leave it out")
    if found is not None:
        return _checked(found, kind)
    path = Path(source).expanduser()
    if not path.exists():
        return _pattern(source, kind, wanted)
    if path.is_dir():
        return _folder(path, kind, wanted)
    return _file(path, kind, wanted)


def _file(path: Path, kind: Kind, wanted: Wanted) -> Inputs:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        from selfdistill.data.inputs.parquet import Table

        return Table(path, kind, wanted)
    if suffix in TABLES:
        return TextRows(path, wanted) if kind == "text" else listed(path, wanted)
    if kind == "image":
        if suffix in _ARCHIVES:
            return files.tarred(path)
        if suffix == ".zip":
            raise UserError(f"{path} is an archive: extract it, and give the folder")
        return files.Files(str(path), [path])
    raise UserError(
        f"{path} is no file of texts ({', '.join(TABLES)}, .parquet): the model takes texts"
    )


def _folder(path: Path, kind: Kind, wanted: Wanted) -> Inputs:
    if kind == "text":
        tables = [p for p in sorted(path.iterdir()) if p.suffix.lower() in (*JSONL, ".csv", ".tsv")]
        if len(tables) == 1:
            _refuse_mixed(path, tables, kind)
            return TextRows(tables[0], wanted)
        if tables:
            names = ", ".join(p.name for p in tables[:4])
            raise UserError(f"{path} holds several tables ({names}): give one of them")
    elif tarred := tars.beside(path):
        _refuse_mixed(path, tarred, kind)
        return files.tarred(path)
    return files.folder(path, kind)


def _refuse_mixed(path: Path, holders: list[Path], kind: Kind) -> None:
    """Refuses a folder of files, each an input, and of a table or tars that hold inputs, too."""
    suffixes = files.kinds(kind)
    single, _ = files_below(path, suffixes)
    if single:
        what = "pictures" if kind == "image" else "texts"
        raise UserError(
            f"{path} holds {len(single)} files of {what}, such as {single[0].name}, and"
            f" {holders[0].name}, which holds some, too: move one of them away, or give"
            f" {holders[0]}"
        )


def _pattern(source: str, kind: Kind, wanted: Wanted) -> Inputs:
    """The files that a pattern names; a table by itself is read as one that is named.

    Raises:
        UserError: there are none, or several tables.
    """
    source = os.path.expanduser(source)
    there = (
        sorted(Path(p) for p in glob.glob(source, recursive=True)) if glob.has_magic(source) else []
    )
    there = [path for path in there if path.is_file()]
    tables = [p for p in there if p.suffix.lower() in (*JSONL, ".csv", ".tsv", ".parquet")]
    if tables and len(there) == 1:
        return _file(there[0], kind, wanted)
    if tables and (kind == "text" or tables == there):
        names = ", ".join(p.name for p in tables[:4])
        raise UserError(
            f"{source} names {len(there)} files with tables ({names}): give one of them"
        )
    if there:
        return files.Files(source, there, kind=kind)
    path = Path(source)
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UserError(f"there is no {source}.{nearest(path.name, beside, '')} Give {kind}s")


def _standard(kind: Kind, asked: Stdin) -> Inputs:
    """What comes by standard input.

    Raises:
        UserError: nothing does, it is of the other kind, or several processes would read it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("standard input comes to one process alone: write it to a file first")
    if asked == "texts" and kind == "image":
        raise UserError("--stdin texts: the model takes images: give --stdin paths")
    if sys.stdin.isatty():
        print("reading standard input, to its end (Ctrl-D)", file=sys.stderr)
    content = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    lines = [line for line in content.removeprefix("\ufeff").split("\n") if line.strip()]
    lines = [line.strip("\r") for line in lines]
    if not lines:
        raise UserError("standard input has no lines: give an input a line")
    if asked == "paths" or kind == "image":
        return files.Files("standard input", [Path(line) for line in lines], kind=kind)
    return Lines(lines)


def _checked(found: packed.Packed, kind: Kind) -> packed.Packed:
    if found.kind != kind:
        raise UserError(
            f"{found.root} holds {found.kind}s, the model takes {kind}s: give {kind}s, or another"
            " model"
        )
    return found
