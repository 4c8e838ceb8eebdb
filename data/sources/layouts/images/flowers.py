"""Oxford Flowers 102 (Nilsback and Zisserman 2008): 1,020 train, 1,020 val, 6,149 test.

    jpg/image_00001.jpg
    imagelabels.mat    labels 1..102, one for each image
    setid.mat          trnid, valid, tstid: numbers of the images

The release gives the classes numbers and no names.
"""

from pathlib import Path

from selfdistill.data.errors import UserError
from selfdistill.data.sources.layouts import base
from selfdistill.data.sources.layouts.images import mat

NAME = "flowers"
TITLE = "Oxford Flowers 102"


def where(root: Path) -> Path | None:
    """The folder that has ``jpg`` and the two lists."""
    wanted = ("jpg", "imagelabels.mat", "setid.mat")
    return base.find(root, (".", "flowers-102", "102flowers"), wanted)


def read(folder: Path, options: base.Options) -> base.Layout:
    """Reads the official splits; see `base.Layout`."""
    (labels,) = mat.load(folder / "imagelabels.mat", "labels")
    ids = dict(
        zip(
            ("train", "val", "test"),
            mat.load(folder / "setid.mat", "trnid", "valid", "tstid"),
            strict=True,
        )
    )
    splits = {}
    for split, numbers in ids.items():
        if len(numbers) and not 1 <= numbers.min() <= numbers.max() <= len(labels):
            raise UserError(
                f"{folder}: setid.mat names image {numbers.max()} and imagelabels.mat has"
                f" {len(labels)} labels: take both files from the same release"
            )
        rows = [(f"image_{number:05d}.jpg", int(labels[number - 1]) - 1) for number in numbers]
        splits[split] = base.files(folder / "jpg", rows)
    classes = [f"{number:03d}" for number in range(1, int(labels.max()) + 1)]
    notes = []
    if not options.trainval:
        notes.append("the paper trains on train and val together (2,040 images): --trainval")
    return base.Layout(NAME, classes, splits, notes)
