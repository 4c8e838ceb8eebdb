"""Stanford Dogs (Khosla et al. 2011): 120 breeds, 12,000 train, 8,580 test, no validation split.

Images/n02085620-Chihuahua/n02085620_10074.jpg
lists/{train,test}_list.mat    file_list (cells), labels 1..120; also found beside ``Images``
"""

from pathlib import Path, PurePosixPath

from selfdistill.data.sources.layouts import base
from selfdistill.data.sources.layouts.images import mat

NAME = "dogs"
TITLE = "Stanford Dogs"


def where(root: Path) -> Path | None:
    """The folder that has ``Images`` and the lists."""
    for lists in ("lists/", ""):
        wanted = ("Images", f"{lists}train_list.mat", f"{lists}test_list.mat")
        if found := base.find(root, (".", "stanford_dogs"), wanted):
            return found
    return None


def read(folder: Path, options: base.Options) -> base.Layout:
    """Reads the official splits; see `base.Layout`."""
    lists = folder / "lists" if (folder / "lists").is_dir() else folder
    rows = {}
    for split in ("train", "test"):
        names, labels = mat.load(lists / f"{split}_list.mat", "file_list", "labels")
        rows[split] = [(str(n), int(y) - 1) for n, y in zip(names, labels, strict=True)]
    # "n02085620-Chihuahua" is WordNet's number and the breed; every class is in both splits.
    breeds = {label: PurePosixPath(name).parent.name for name, label in rows["train"]}
    classes = [breeds[label].partition("-")[2] or breeds[label] for label in sorted(breeds)]
    splits = {split: base.files(folder / "Images", listed) for split, listed in rows.items()}
    return base.Layout(NAME, classes, splits)
