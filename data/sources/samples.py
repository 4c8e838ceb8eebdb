"""Samples to pack, by split or not divided yet: what all sources of data share."""

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from selfdistill.data.errors import UserError
from selfdistill.data.formats.labels import Label
from selfdistill.data.formats.texts import Text
from selfdistill.data.splits import DIVIDED


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns.

    Attributes:
        path: of an image's file.
        text: of the text.
        pair: of the second of a pair; it need not be there.
        label: of the class, a name or a number.
        key: of the samples' names; it need not be there. No two may be equal.
        group: of what must stay in one split, such as patients; None: every sample for itself.
        separator: not a column, but what stands between several labels of a cell; None: one each.
    """

    path: str = "path"
    text: str = "text"
    pair: str = "text_pair"
    label: str = "label"
    key: str = "id"
    group: str | None = None
    separator: str | None = None

    @property
    def names_text(self) -> bool:
        """Whether, of a table that has images too, the texts were asked for by their column."""
        named = (self.text, self.pair) != (Columns.text, Columns.pair)
        return named and self.path == Columns.path


class Sample(NamedTuple):
    """One sample to pack: key, what it is, its class number or numbers (None: unlabelled).

    `where` names it in messages; by default its file, or the key. Samples of one `group` stay in
    one split.
    """

    key: str
    source: Path | bytes | Callable[[], bytes] | Text
    label: Label | None
    where: str | None = None
    group: str | None = None

    @property
    def name(self) -> str:
        """For messages."""
        if self.where is not None:
            return self.where
        return str(self.source) if isinstance(self.source, Path) else self.key


class Stream:
    """Samples without labels, made anew at each pass: they may be more than memory holds.

    Args:
        makers: Starts a pass over all of them; makes each where it is wanted.
        length: Their number.
        listing: Hash of the names of all of them, in order.
        taken: bool [length], which of them belong to this stream; None for all.
    """

    def __init__(
        self,
        makers: Callable[[], Iterator[Callable[[], Sample]]],
        length: int,
        listing: str,
        taken: NDArray[np.bool_] | None = None,
    ) -> None:
        self._makers, self._listing = makers, listing
        self._taken = np.ones(length, dtype=bool) if taken is None else taken

    def __len__(self) -> int:
        return int(self._taken.sum())

    def __iter__(self) -> Iterator[Sample]:
        return (make() for make in self.makers())

    def makers(self) -> Iterator[Callable[[], Sample]]:
        """What makes each sample, in order: a pass that wants few of them makes no others."""
        return itertools.compress(self._makers(), self._taken)

    def digest(self) -> str:
        """A hash of the samples' names, in their order, without another pass."""
        taken = np.packbits(self._taken).tobytes()
        return hashlib.sha256(self._listing.encode() + taken).hexdigest()

    def take(self, rows: NDArray[np.bool_]) -> "Stream":
        """Those of this stream that are True in `rows`, bool [len(self)]."""
        taken = np.zeros_like(self._taken)
        taken[np.flatnonzero(self._taken)[rows]] = True
        return Stream(self._makers, len(taken), self._listing, taken)


Samples = list[Sample] | Stream
# Per split its samples and the names of the classes.
Splits = dict[str, tuple[Samples, list[str]]]


def listed(samples: Iterable[Sample]) -> tuple[int, str]:
    """The number of some samples, and a hash of their names and labels, in their order."""
    found, count = hashlib.sha256(), 0
    for sample in samples:
        found.update(f"{sample.key}\0{sample.name}\0{sample.label}\n".encode(errors="replace"))
        count += 1
    return count, found.hexdigest()


class Row(NamedTuple):
    """A sample in a list of them: its split ("" where the list is not divided), its label's name.

    A tuple of names where samples have several labels.
    `where` names it in messages.
    """

    split: str
    where: str
    key: str
    source: Path | Text
    label: str | tuple[str, ...] | None
    group: str | None = None


def names_of(label: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The names of a row's classes."""
    return label if isinstance(label, tuple) else () if label is None else (label,)


def grouped(rows: list[Row]) -> Splits:
    """Samples by split, their labels numbered.

    Raises:
        UserError: there is a split train, and it lacks a class that another split has; or a group
            lies in two splits.
    """
    home: dict[str, Row] = {}
    for row in rows:
        first = row if row.group is None else home.setdefault(row.group, row)
        if first.split != row.split:
            raise UserError(
                f"{row.where}: group {row.group!r} is in split {row.split}, and in"
                f" {first.split} ({first.where}): put it into one, or take --group_column out"
            )
    classes = class_order(name for row in rows for name in names_of(row.label))
    number = {name: i for i, name in enumerate(classes)}
    divided = any(row.split == "train" for row in rows)
    taught = {name for row in rows if row.split == "train" for name in names_of(row.label)}
    for row in rows:
        new = [name for name in names_of(row.label) if divided and name not in taught]
        if new:
            raise UserError(
                f"{row.where}: class {new[0]!r} has no row in split train: add some, correct"
                " its name, or drop it"
            )

    def numbers(label: str | tuple[str, ...] | None) -> Label | None:
        if isinstance(label, tuple):
            return tuple(sorted(number[name] for name in label))
        return None if label is None else number[label]

    found: Splits = {}
    for split in (*DIVIDED, ""):
        samples = [
            Sample(r.key, r.source, numbers(r.label), r.where, r.group)
            for r in rows
            if r.split == split
        ]
        if samples:
            found[split] = (samples, classes)
    return found


def class_order(names: Iterable[str]) -> list[str]:
    """Class names in order: as numbers if all are, so that the classes 0..10 keep their numbers."""
    found = set(names)
    numeric = all(re.fullmatch(r"\d{1,18}(\.0+)?", n) for n in found)
    return sorted(found, key=lambda n: (int(n.split(".")[0]), n) if numeric else (0, n))
