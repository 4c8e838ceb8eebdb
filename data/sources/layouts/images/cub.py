"""CUB-200-2011 (Wah et al. 2011): 200 birds, 5,994 train, 5,794 test, no validation split.

CUB_200_2011/classes.txt               "1 001.Black_footed_Albatross"
CUB_200_2011/images.txt                "1 001.Black_footed_Albatross/x.jpg"
CUB_200_2011/image_class_labels.txt    "1 1"
CUB_200_2011/train_test_split.txt      "1 0", where 1 is train
CUB_200_2011/images/001.Black_footed_Albatross/x.jpg
"""

from pathlib import Path

from selfdistill.data.errors import UserError
from selfdistill.data.sources.layouts import base

NAME = "cub"
TITLE = "CUB-200-2011"
LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")


def where(root: Path) -> Path | None:
    """The folder of the lists, if `root` is or holds it."""
    return base.find(root, (".", "CUB_200_2011"), LISTS)


def read(folder: Path, options: base.Options) -> base.Layout:
    """Reads the official splits; see `base.Layout`."""
    images = dict(base.pairs(folder / "images.txt"))
    labels = dict(base.pairs(folder / "image_class_labels.txt"))
    is_train = dict(base.pairs(folder / "train_test_split.txt"))
    names = dict(base.pairs(folder / "classes.txt"))
    numbers = {number: row for row, number in enumerate(names)}
    rows: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for image, name in images.items():
        if image not in labels or image not in is_train or labels[image] not in numbers:
            raise UserError(
                f"{folder}: image {image} ({name}) has no line in image_class_labels.txt,"
                " train_test_split.txt or classes.txt: extract the official archive again"
            )
        split = "train" if is_train[image] == "1" else "test"
        rows[split].append((name, numbers[labels[image]]))
    splits = {split: base.files(folder / "images", listed) for split, listed in rows.items()}
    notes = ["the official train split has 5,994 images; the paper's table says 5,594"]
    return base.Layout(NAME, list(names.values()), splits, notes)
