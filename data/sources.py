"""Where samples come from: class folders, split folders, CSV files, known data sets."""

import csv
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data import keyed
from data.cli import nearest
from data.errors import UserError
from data.images import SUFFIXES
from data.manifest import DIVIDED

DEFAULT_SHARES = (0.8, 0.1, 0.1)
_ALIASES = {s: s for s in DIVIDED} | {"valid": "val", "validation": "val"}


class Sample(NamedTuple):
    """One sample to pack: key, where its bytes are, its class number (None: unlabelled)."""

    key: str
    source: Path | bytes | Callable[[], bytes]
    label: int | None


class Stream:
    """Samples without labels, made anew at each pass: they may be more than memory holds.

    Args:
        samples: Starts a pass over all of them.
        length: Their number.
        taken: bool [length], which of them belong to this stream; None for all.
    """

    def __init__(
        self,
        samples: Callable[[], Iterator[Sample]],
        length: int,
        taken: NDArray[np.bool_] | None = None,
    ) -> None:
        self._samples = samples
        self._taken = np.ones(length, dtype=bool) if taken is None else taken

    def __len__(self) -> int:
        return int(self._taken.sum())

    def __iter__(self) -> Iterator[Sample]:
        return itertools.compress(self._samples(), self._taken)

    def take(self, rows: NDArray[np.bool_]) -> "Stream":
        """Those of this stream that are True in `rows`, bool [len(self)]."""
        taken = np.zeros_like(self._taken)
        taken[np.flatnonzero(self._taken)[rows]] = True
        return Stream(self._samples, len(taken), taken)


Samples = list[Sample] | Stream
# Per split its samples and the names of the classes.
Splits = dict[str, tuple[Samples, list[str]]]


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    """All image files below a folder, in order of their paths."""
    found = []
    for base, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in files:
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in SUFFIXES:
                found.append(Path(base, file))
    return sorted(found)


def _unlabelled(folder: Path) -> list[Sample]:
    return [Sample(str(p.relative_to(folder).with_suffix("")), p, None) for p in _images(folder)]


def _class_folders(folder: Path, classes: list[str], whole: bool) -> list[Sample]:
    """Samples of folder/CLASS; with `whole`, a class without images is an error."""
    samples: list[Sample] = []
    for extra in _folders(folder):
        if extra.name not in classes and _images(extra):
            raise UserError(
                f"{extra} is a class that the training images do not have: add such images there,"
                " or remove the folder"
            )
    for label, name in enumerate(classes):
        found = _images(folder / name)
        if whole and not found:
            raise UserError(
                f"class {name!r} has no images in {folder / name}: put some there, or remove the"
                " folder"
            )
        samples += [
            Sample(f"{name}/{p.relative_to(folder / name).with_suffix('')}", p, label)
            for p in found
        ]
    return samples


def _class_names(folder: Path) -> list[str]:
    classes = [p.name for p in _folders(folder)]
    if not classes:
        has = (
            "images but no class folders" if _images(folder) else "neither class folders nor images"
        )
        raise UserError(
            f"{folder} holds {has}: put images into one folder a class, or pack them without labels"
            " (--unlabelled)"
        )
    return classes


def split_folders(root: Path) -> dict[str, Path]:
    """The split folders of a root all of whose folders are such; empty otherwise."""
    found: dict[str, Path] = {}
    for folder in _folders(root):
        split = _ALIASES.get(folder.name.lower())
        if split is None:
            return {}
        if split in found:
            raise UserError(f"{found[split]} and {folder} are both the split {split!r}: merge them")
        found[split] = folder
    return {s: found[s] for s in DIVIDED if s in found}


def from_split_folders(folders: dict[str, Path], unlabelled: bool) -> Splits:
    """Samples of {train,val,test}/CLASS; the first split's folders are the classes."""
    if unlabelled:
        return {split: (_unlabelled(folder), []) for split, folder in folders.items()}
    first = next(iter(folders))
    classes = _class_names(folders[first])
    return {
        split: (_class_folders(folder, classes, whole=split == first), classes)
        for split, folder in folders.items()
    }


def from_csv(path: Path, unlabelled: bool) -> Splits:
    """Samples of a CSV with the columns path, label (unless unlabelled) and, if it likes, split."""
    cure = "correct the file"
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            header = reader.fieldnames or []
            wanted = ["path"] if unlabelled else ["path", "label"]
            for column in wanted:
                if column not in header:
                    raise UserError(
                        f"{path} has no column {column!r} (it has {', '.join(header) or 'none'}):"
                        f" begin it with the line {','.join(wanted)}[,split]"
                    )
            rows = [(reader.line_num, row) for row in reader]
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8: save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}: {error}: {cure}") from None
    if not rows:
        raise UserError(f"{path} has no rows below its header: add one an image")
    entries: list[tuple[str, Path, str, str]] = []
    seen: dict[Path, int] = {}
    for line, row in rows:
        where = f"{path} line {line}"
        if None in row or None in row.values():
            raise UserError(f"{where} has not as many fields as the header: {cure}")
        image = path.parent / row["path"]
        if not row["path"].strip():
            raise UserError(f"{where} has no path: {cure}")
        if not image.is_file():
            raise UserError(
                f"{where}: there is no image {image}: paths are relative to the CSV: {cure}"
            )
        if image in seen:
            raise UserError(f"{where}: {row['path']} stands in line {seen[image]} too: {cure}")
        seen[image] = line
        label = "" if unlabelled else row["label"].strip()
        if not unlabelled and not label:
            raise UserError(
                f"{where}: {row['path']} has no label: {cure}, or pack with --unlabelled"
            )
        split = (row.get("split") or "").strip().lower()
        if "split" in header and split not in _ALIASES:
            raise UserError(f"{where}: split {split!r} is none of {', '.join(DIVIDED)}: {cure}")
        entries.append((_ALIASES.get(split, ""), image, label, row["path"]))
    names = {label for _, _, label, _ in entries if label}
    # Numbers are sorted as numbers, so that the classes 0..10 keep their numbers.
    numeric = all(n.isdecimal() for n in names)
    classes = sorted(names, key=lambda n: (int(n), n) if numeric else (0, n))
    number = {n: i for i, n in enumerate(classes)}
    found: Splits = {}
    for split in (*DIVIDED, ""):
        samples = [
            Sample(os.path.splitext(key)[0], image, number[label] if label else None)
            for s, image, label, key in entries
            if s == split
        ]
        if samples:
            found[split] = (samples, classes)
    if "train" in found:
        missing = set(range(len(classes))) - {s.label for s in found["train"][0]}
        if missing:
            name = classes[min(missing)]
            raise UserError(
                f"{path}: class {name!r} has no row in split train: add some, or drop it"
            )
    return found


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
        or abs(sum(shares) - 1) > 1e-6
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


def divide(samples: Samples, shares: tuple[float, ...], seed: int) -> dict[str, Samples]:
    """Divides samples at random into splits, class by class.

    Args:
        samples: All of them.
        shares: Of train, val and test.
        seed: Another seed, another division.

    Returns:
        Per split its samples in their old order. A class of n gives each split its share of n
        rounded (boundaries are rounded, so nothing is lost); train gets at least one of each.
    """
    if isinstance(samples, Stream):
        labels = np.full(len(samples), -1)
    else:
        labels = np.array([-1 if s.label is None else s.label for s in samples])
    owner = np.zeros(len(samples), dtype=np.int64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        rows = rows[keyed.permutation(seed, f"split {label}", 0, len(rows))]
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


def find(root: Path, *, unlabelled: bool = False, split: str | None = None) -> Splits:
    """The samples of class folders, split folders or a CSV.

    Args:
        root: Folder or CSV file.
        unlabelled: Leave labels away.
        split: Everything is to become this split, so a folder `train` is a class like any other.

    Returns:
        Per split its samples and classes; the split "" where the source is not divided.

    Raises:
        UserError: The source is missing, empty or contradicts itself.
    """
    if not root.exists():
        beside = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        hint = nearest(root.name, beside, "") or " Give a folder of images or a CSV file."
        raise UserError(f"there is no {root}.{hint}")
    if root.is_file():
        if root.suffix.lower() != ".csv":
            raise UserError(f"{root} is neither a folder, an archive nor a .csv file: give one")
        found = from_csv(root, unlabelled)
    elif split is None and (folders := split_folders(root)):
        found = from_split_folders(folders, unlabelled)
    elif unlabelled:
        found = {"": (_unlabelled(root), [])}
    else:
        classes = _class_names(root)
        found = {"": (_class_folders(root, classes, whole=True), classes)}
    found = {s: v for s, v in found.items() if v[0]}
    if not found:
        known = " ".join(sorted(SUFFIXES))
        raise UserError(f"{root} has no images: give a folder of them ({known})")
    return found


def find_extra(root: Path) -> list[Sample]:
    """All images of a folder, without labels.

    Args:
        root: The folder.

    Returns:
        The samples.

    Raises:
        UserError: There are none.
    """
    if not root.is_dir():
        wrong = "is no folder" if root.exists() else "does not exist"
        raise UserError(f"--unlabelled {root} {wrong}: give a folder of images, as the source has")
    samples = _unlabelled(root)
    if not samples:
        known = " ".join(sorted(SUFFIXES))
        raise UserError(f"--unlabelled {root} has no images: give a folder of them ({known})")
    return samples


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
