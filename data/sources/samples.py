"""Samples to pack, and their division into splits: what all sources of data share."""

import hashlib
import itertools
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from selfdistill.data import rng
from selfdistill.data.errors import UserError
from selfdistill.data.formats.labels import Label
from selfdistill.data.formats.texts import Text
from selfdistill.data.splits import DIVIDED

# Of groups, which are joined to splits: shares are met to a twentieth.
_FOLDS = 20
DEFAULT_SHARES = (0.8, 0.1, 0.1)


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


def parse_shares(text: str | None) -> tuple[float, ...]:
    """Shares of train, val and test from e.g. "0.8,0.1,0.1"."""
    if text is None:
        return DEFAULT_SHARES
    try:
        shares = tuple(float(part) for part in text.strip("()[] ").split(","))
    except ValueError:
        shares = ()
    if (
        not 1 <= len(shares) <= 3
        or min(shares) < 0
        or shares[0] == 0
        or not abs(sum(shares) - 1) <= 1e-6  # nor is nan
    ):
        raise UserError(
            f"--splits {text}: give shares of train, val and test that add up to 1,"
            " e.g. 0.8,0.1,0.1"
        )
    return shares


def _take(samples: Samples, rows: NDArray[np.bool_]) -> Samples:
    """Those that are True in `rows`, bool [n]."""
    if isinstance(samples, Stream):
        return samples.take(rows)
    return list(itertools.compress(samples, rows))


def strata(labels: Sequence[Label | None]) -> NDArray[np.int64]:
    """What samples are divided by: their class; of several the one that the fewest samples have.

    So each split gets its share of the rare classes, which would be lost among common ones. -1 is
    that of samples without a class.
    """
    counts = Counter(one for label in labels if isinstance(label, tuple) for one in label)

    def of(label: Label | None) -> int:
        if isinstance(label, tuple):
            return min(label, key=lambda one: (counts[one], one), default=-1)
        return -1 if label is None else label

    return np.array([of(label) for label in labels], dtype=np.int64)


def divide(samples: Samples, shares: tuple[float, ...], seed: int) -> dict[str, Samples]:
    """Divides samples at random into splits, class by class.

    Args:
        samples: All of them.
        shares: Of train, val and test.
        seed: Another seed, another division.

    Returns:
        Per split its samples in their old order. A class of n gives each split its share of n
        rounded (boundaries are rounded, so nothing is lost); train gets at least one of each.
        Groups stay whole, and the shares are met as nearly as they allow. Samples with several
        labels go by the rarest (`strata`).
    """
    if isinstance(samples, list) and any(sample.group is not None for sample in samples):
        return _divide_groups(samples, shares, seed)
    if isinstance(samples, Stream):
        labels = np.full(len(samples), -1)
    else:
        labels = strata([s.label for s in samples])
    owner = np.zeros(len(samples), dtype=np.int64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        rows = rows[rng.permutation(seed, f"split {label}", 0, len(rows))]
        bounds = np.rint(np.cumsum(shares) * len(rows)).astype(int)
        bounds = np.maximum(bounds, max(1, bounds[0]))
        for i in range(1, len(shares)):
            owner[rows[bounds[i - 1] : bounds[i]]] = i
    found: dict[str, Samples] = {}
    for i, split in enumerate(DIVIDED):
        rows = owner == i
        if rows.any():
            found[split] = _take(samples, rows)
    return found


def _divide_groups(
    samples: list[Sample], shares: tuple[float, ...], seed: int
) -> dict[str, Samples]:
    """`divide` for samples in groups: folds of whole groups with about equal classes, joined.

    Raises:
        UserError: there are fewer groups than splits.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # a second to import

    groups = np.array([f"{s.group}" if s.group else f"\0{i}" for i, s in enumerate(samples)])
    labels = strata([s.label for s in samples])
    count, wanted = len(np.unique(groups)), sum(share > 0 for share in shares)
    if count < wanted:
        raise UserError(
            f"--group_column: {count} groups cannot fill {wanted} splits: add some, or give fewer"
            " shares (--splits)"
        )
    most = int(np.unique(labels, return_counts=True)[1].max())  # more folds than that it refuses
    folds = StratifiedGroupKFold(min(_FOLDS, count, most), shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with fewer samples than folds
        parts = [rows for _, rows in folds.split(labels, labels, groups)]
    bounds = np.rint(np.cumsum(shares) * len(parts)).astype(int)
    bounds[0] = max(1, bounds[0])
    found: dict[str, Samples] = {}
    for split, begin, end in zip(DIVIDED, [0, *bounds[:-1]], bounds, strict=False):
        if rows := [row for part in parts[begin:end] for row in part.tolist()]:
            found[split] = [samples[row] for row in sorted(rows)]
    return found


def hold_out(found: Splits, fraction: float, seed: int) -> Splits:
    """Sets part of train aside as val, of each class the same fraction, where there is no val.

    Args:
        found: A source's own splits.
        fraction: Between 0 and 1.
        seed: Another seed, another choice.

    Returns:
        The splits, with a val.

    Raises:
        UserError: The fraction is out of range, there is nothing to divide, or a val already.
    """
    cure = ""
    if not 0 < fraction < 1:
        cure = "give a number between 0 and 1, such as 0.1"
    elif "" in found:
        cure = "it is for sources with splits of their own; divide this one with --splits"
    elif "val" in found:
        cure = "the source has a val split; drop the option, or join val to train (--trainval)"
    elif "train" not in found:
        cure = f"the source has no train split, only {', '.join(found)}; drop the option"
    if cure:
        raise UserError(f"--val_fraction {fraction}: {cure}")
    samples, classes = found["train"]
    parts = divide(samples, (1 - fraction, fraction), seed)
    return {**found, **{split: (part, classes) for split, part in parts.items()}}


def settle(
    found: Splits,
    root: Path,
    shares: str | None,
    split: str | None,
    seed: int,
    val_fraction: float = 0.0,
) -> Splits:
    """Divides what is not divided yet, or takes one split.

    Args:
        found: From `find` or a layout.
        root: Where it is from, for messages.
        shares: Text of --splits.
        split: Take everything as this split, or this one of several.
        seed: Of the division.
        val_fraction: Part of train to set aside as val; 0 for none.

    Returns:
        Per split its samples and classes.

    Raises:
        UserError: The options contradict the source or each other.
    """
    if shares is not None and split is not None:
        raise UserError("--splits divides, --split packs everything as one: give one of them")
    parsed = parse_shares(shares)
    if shares is not None and "" not in found:
        has = ", ".join(found)
        raise UserError(f"{root} has splits of its own ({has}): leave --splits out")
    if val_fraction:
        found = hold_out(found, val_fraction, seed)
    if split is not None:
        if "" not in found and split not in found:
            has = ", ".join(found)
            raise UserError(f"{root} has no split {split!r}, it has {has}: give one of these")
        return {split: found.get(split) or found[""]}
    if "" not in found:
        return found
    samples, classes = found[""]
    return {s: (part, classes) for s, part in divide(samples, parsed, seed).items()}
