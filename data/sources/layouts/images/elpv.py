"""Solar cells in electroluminescence images (Deitsch et al. 2019), as in the package elpv-dataset.

    elpv_dataset/data/labels.csv              "images/cell0001.png  1.0                 mono"
    elpv_dataset/data/images/cell0001.png

2,624 grey pictures of 300x300 pixels. The number is the probability of a defect, as experts saw it:
0, 1/3, 2/3 or 1, which are the classes. The kind of cell (mono or poly) is no part of them. There
are no official splits, and nothing says which of the 44 modules a cell is from.
"""

import re
from pathlib import Path

from selfdistill.data.errors import UserError
from selfdistill.data.sources.layouts import base

NAME = "elpv"
TITLE = "solar cells (elpv-dataset)"
CLASSES = ["0.00", "0.33", "0.67", "1.00"]
_LINE = re.compile(r"(images/[^/\s]+)\s+([01]\.\d+)\s+(?:mono|poly)")


def where(root: Path) -> Path | None:
    """The folder of the list, if `root` is or holds it; other sets have a labels.csv, too."""
    folder = base.find(root, (".", "data", "elpv_dataset/data"), ("labels.csv", "images"))
    if folder is None:
        return None
    try:
        _, first = next(base.lines(folder / "labels.csv"), (0, ""))
    except UserError:  # no text: not this set
        return None
    return folder if _LINE.fullmatch(first) else None


def read(folder: Path, options: base.Options) -> base.Layout:
    """Reads the list; see `base.Layout`. The packer divides it, class by class."""
    listed = folder / "labels.csv"
    rows = []
    for number, line in base.lines(listed):
        found = _LINE.fullmatch(line)
        name = f"{float(found[2]):.2f}" if found else ""
        if found is None or name not in CLASSES:
            raise UserError(
                f"{listed}, line {number}: {line!r} is not a picture, a probability of 0, 1/3, 2/3"
                " or 1, and mono or poly: install the package again"
            )
        rows.append((found[1], CLASSES.index(name)))
    notes = [
        "no official splits: divided class by class at random; cells of one module may stand in"
        " more than one split, as the set does not say which belong together"
    ]
    return base.Layout(NAME, CLASSES, {"": base.files(folder, rows)}, notes)
