"""Classes of tars made elsewhere, and of a split that joins others: names, and their numbers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from selfdistill.data import files
from selfdistill.data.cli import nearest
from selfdistill.data.errors import UserError
from selfdistill.data.formats.labels import Label
from selfdistill.data.shards.manifest import FILE, Manifest
from selfdistill.data.shards.scan import Scanned
from selfdistill.data.sources import label_checks
from selfdistill.data.sources.samples import Splits, class_order
from selfdistill.data.splits import DIVIDED


def settle(
    path: str | None,
    scanned: Sequence[Scanned],
    folder: Path,
    indexed: set[str],
    packed: Sequence[Manifest] = (),
) -> tuple[list[str], Sequence[Scanned]]:
    """Names of the classes, and the tars with labels that are numbers of these.

    Args:
        path: File of names, if there is one.
        scanned: All tars that are indexed.
        folder: The data set's, where other splits may lie.
        indexed: The splits that are indexed now.
        packed: What data.pack wrote of them before: its names stay where the labels fit.

    Raises:
        UserError: A label is none of the classes.
    """
    listed = None if path is None else _listed(path)
    if any(s.names for s in scanned):
        return _by_name(path, listed, scanned, folder, indexed)
    greatest = max((int(s.labels.max()) for s in scanned if len(s.labels)), default=-1)
    before = [one.classes for one in packed if one.classes]
    fits = bool(before) and 0 <= greatest < len(before[0])
    if listed is None and fits and all(names == before[0] for names in before):
        return before[0], scanned
    if listed is None:
        return [str(number) for number in range(greatest + 1)], scanned
    if greatest >= len(listed):
        shard, row = next(
            (s, int(np.argmax(s.labels))) for s in scanned if (s.labels == greatest).any()
        )
        raise UserError(
            f"shard {shard.shard.name}, sample {row}: label {greatest} is outside the {len(listed)}"
            f" classes of {path}: labels begin at 0; add the names that are missing"
        )
    return listed, scanned


def _listed(path: str) -> list[str]:
    """The names in a file of them."""
    try:
        text = files.read(Path(path), "give a text file").decode("utf-8-sig")
    except (FileNotFoundError, UnicodeDecodeError):
        raise UserError(
            f"--classes {path}: no text file there: give one with a class name a line, in the order"
            " of the labels"
        ) from None
    names = [line.strip() for line in text.rstrip().split("\n")]
    for number, name in enumerate(names):
        if not name or name in names[:number]:
            wrong = f"{name} stands in line {names.index(name) + 1} too" if name else "it is empty"
            raise UserError(
                f"{path} line {number + 1}: {wrong}, and labels count the lines: correct the file"
            )
    return names


def _by_name(
    path: str | None,
    listed: list[str] | None,
    scanned: Sequence[Scanned],
    folder: Path,
    indexed: set[str],
) -> tuple[list[str], Sequence[Scanned]]:
    """Labels that are names: of the list, of the splits that are there already, or all in order."""
    names, where = listed, f"classes of {path}"
    for split in DIVIDED:
        if names is None and split not in indexed and (folder / split / FILE).is_file():
            names = Manifest.load(str(folder / split)).classes or None
            where = f"classes of {folder / split}"
    if names is None:
        names = class_order(name for s in scanned for name in s.names)
        label_checks.refuse(names, sum(len(s.labels) for s in scanned if s.names))
    number = {name: i for i, name in enumerate(names)}
    for s in scanned:
        unknown = next((name for name in s.names if name not in number), None)
        if unknown is not None:
            row = int(np.argmax(s.labels == s.names.index(unknown)))
            raise UserError(
                f"shard {s.shard.name}, sample {row}: {unknown!r} is not among the {len(names)}"
                f" {where}: correct it, or index all splits together (--overwrite)."
                + nearest(unknown, names, prefix="")
            )
    return names, [
        s.renumbered([number[name] for name in s.names]) if s.names else s for s in scanned
    ]


def _moved(label: Label | None, number: Sequence[int]) -> Label | None:
    """A label, or labels, under other numbers."""
    if isinstance(label, tuple):
        return tuple(sorted(number[one] for one in label))
    return None if label is None else number[label]


def renumbered(found: Splits, split: str, out_dir: Path) -> Splits:
    """A split that joins others takes their numbers of the classes, which go by name."""
    samples, classes = found[split]
    for other in DIVIDED:
        if other == split or not classes or not (out_dir / other / FILE).is_file():
            continue
        theirs = Manifest.load(str(out_dir / other)).classes
        unknown = [c for c in classes if c not in theirs]
        if unknown:
            raise UserError(
                f"class {unknown[0]!r} is not among the {len(theirs)} classes of {out_dir / other}:"
                " correct its name, or pack all splits together"
            )
        number = [theirs.index(c) for c in classes]
        moved = [s._replace(label=_moved(s.label, number)) for s in samples]
        return {split: (moved, theirs)}
    return found
