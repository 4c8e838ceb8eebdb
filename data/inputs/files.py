"""Files as inputs: a folder of any shape, lists of paths, tars of pictures."""

import hashlib
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from selfdistill.data import files
from selfdistill.data.errors import UserError, counted
from selfdistill.data.formats import images
from selfdistill.data.formats.strays import is_stray
from selfdistill.data.formats.texts import Text
from selfdistill.data.inputs.base import Input, Inputs, broken
from selfdistill.data.shards import tars
from selfdistill.data.shards.scan import compressed
from selfdistill.data.sources.images import files_below

#: Pictures that are not read here: a folder's are listed, each with its error.
FOREIGN = frozenset(
    f".{kind}"
    for kind in ("heic", "heif", "jxl", "psd", "svg", "exr", "dng", "cr2", "cr3", "nef", "arw")
)
_PICTURES = images.SUFFIXES | FOREIGN
_CURE = "give a regular file"


def shown(path: str | os.PathLike[str]) -> str:
    """A path as text that UTF-8 can hold; bytes that are none are written out."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


class Files(Inputs):
    """Files by their paths.

    Args:
        root: see `Inputs`.
        paths: of the files.
        names: of the inputs; by default the paths.
        kind: `text` reads each file as one text.
        notes: see `Inputs`.
    """

    def __init__(
        self,
        root: str,
        paths: Sequence[Path],
        names: Sequence[str] | None = None,
        kind: Literal["image", "text"] = "image",
        notes: Sequence[str] = (),
    ) -> None:
        self.root, self.kind, self.notes = root, kind, list(notes)
        self.paths, self.samples = paths, len(paths)
        self.names = [shown(path) for path in paths] if names is None else names

    def read(self, place: int) -> Input:
        """See `Inputs`."""
        path, name = self.paths[place], self.names[place]
        try:
            content = files.read(path, _CURE)
            if not self.texts:
                return Input(name, content)
            # The last line's end is the file's, not the text's.
            return Input(name, Text(content.decode("utf-8-sig").rstrip("\r\n"), None))
        except (FileNotFoundError, NotADirectoryError):
            return broken(name, "it is not there")
        except UnicodeDecodeError as error:
            return broken(name, f"it is not UTF-8 (byte {error.start})")
        except (OSError, UserError) as error:
            return broken(name, f"it {str(error).removeprefix(f'{path} ')}")

    @property
    def texts(self) -> bool:
        """Whether each file is a text."""
        return self.kind == "text"

    def digest(self) -> str:
        """See `Inputs`."""
        return _digest(self.names, self.paths)


class Tarred(Inputs):
    """Pictures in tars, read from where they lie.

    Args:
        root: see `Inputs`.
        paths: of the tars.

    Raises:
        UserError: one is broken or compressed.
    """

    kind = "image"

    def __init__(self, root: str, paths: Sequence[Path]) -> None:
        self.root, self.paths, self.names = root, paths, list[str]()
        self._places: list[tuple[int, int, int]] = []
        others: Counter[str] = Counter()
        for number, path in enumerate(paths):
            try:
                members = tars.scan(path)
            except tarfile.ReadError as error:
                raise UserError(f"{path} is no whole tar ({error}): copy it again") from None
            for member in members:
                suffix = os.path.splitext(member.name)[1].lower()
                if is_stray(member.name):
                    continue
                if suffix in _PICTURES:
                    self.names.append(f"{shown(path)}/{member.name}")
                    self._places.append((number, member.offset, member.size))
                else:
                    others[suffix or "no suffix"] += 1
        self.samples, self.notes = len(self.names), _left_out(others)

    def read(self, place: int) -> Input:
        """See `Inputs`."""
        number, at, size = self._places[place]
        try:
            with files.opened(self.paths[number], _CURE) as file:
                content = os.pread(file.fileno(), size, at)
        except (OSError, UserError) as error:
            return broken(self.names[place], error)
        return Input(self.names[place], content)

    def digest(self) -> str:
        """See `Inputs`."""
        return _digest(self.names, self.paths)


def kinds(kind: Literal["image", "text"]) -> frozenset[str]:
    """Suffixes of files that are each an input."""
    return frozenset(_PICTURES) if kind == "image" else frozenset({".txt"})


def folder(root: Path, kind: Literal["image", "text"]) -> Files:
    """All files below a folder, in the order of their paths; hidden ones and the like are none.

    Raises:
        UserError: it has none, or cannot be listed.
    """
    paths, others = files_below(root, kinds(kind))
    if not paths:
        there = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(3))
        what = "pictures" if kind == "image" else "texts (.txt)"
        raise UserError(
            f"{root} has no {what} (it has {there or 'no files'}): give a folder or a file of"
            f" {kind}s"
        )
    return Files(str(root), paths, kind=kind, notes=_left_out(others))


def tarred(root: Path) -> Tarred:
    """The pictures of a tar, or of a folder's tars.

    Raises:
        UserError: it is broken or compressed, or holds none.
    """
    if root.is_file() and root.suffix.lower() != ".tar":
        raise UserError(f"{root} {compressed(root.name)}")
    found = Tarred(str(root), tars.beside(root) if root.is_dir() else [root])
    if not found.samples:
        raise UserError(f"{root} holds no pictures: give tars of pictures")
    return found


def _left_out(others: Counter[str]) -> list[str]:
    if not others:
        return []
    listed = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
    count = counted(sum(others.values()), "file", "files")
    return [f"note: left out: {count} of other kinds ({listed})"]


def _digest(names: Sequence[str], paths: Sequence[Path]) -> str:
    """A hash of names and of where their files lie: tables of two folders may have equal names."""
    digest = hashlib.sha256()
    for name in (*names, *map(os.path.abspath, paths)):
        digest.update(name.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
