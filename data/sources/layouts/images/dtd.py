"""Describable Textures (Cimpoi et al. 2014), release r1.0.1: 47 textures, 10 published folds.

    dtd/labels/{train,val,test}{1..10}.txt    "banded/banded_0002.jpg"
    dtd/images/banded/banded_0002.jpg

Each fold has 1,880 images in each of train, val and test.
"""

from pathlib import Path, PurePosixPath

from selfdistill.data.errors import UserError
from selfdistill.data.sources.layouts import base

NAME = "dtd"
TITLE = "Describable Textures (DTD)"
FOLDS = 10
OPTIONS = ("fold",)


def where(root: Path) -> Path | None:
    """The folder that has ``labels`` and ``images``, if `root` is or holds it."""
    return base.find(root, (".", "dtd"), ("labels/train1.txt", "labels/test1.txt", "images"))


def read(folder: Path, options: base.Options) -> base.Layout:
    """Reads one published fold; see `base.Layout`."""
    if not 1 <= options.fold <= FOLDS:
        raise UserError(f"--fold {options.fold}: DTD has folds 1 to {FOLDS}")
    classes = sorted(path.name for path in (folder / "images").iterdir() if path.is_dir())
    splits = {}
    for split in ("train", "val", "test"):
        listed = folder / "labels" / f"{split}{options.fold}.txt"
        rows = [
            (name, base.number_of(classes, PurePosixPath(name).parent.name, listed))
            for _, name in base.lines(listed)
        ]
        splits[split] = base.files(folder / "images", rows)
    notes = [
        f"fold {options.fold} of {FOLDS}; the paper's 4,230 training images are three quarters of"
        " the 5,640 and no union of official splits (train and val have 3,760: --trainval)"
    ]
    return base.Layout(NAME, classes, splits, notes)
