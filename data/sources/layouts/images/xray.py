"""Chest X-ray pneumonia (Kermany et al. 2018): NORMAL and PNEUMONIA.

    chest_xray/{train,val,test}/{NORMAL,PNEUMONIA}/x.jpeg

The release as it is widely mirrored has 5,216 train, 16 val and 624 test pictures; the authors' own
archive has no val folder and 5,232 in train. Both carry what macOS leaves behind (``__MACOSX``,
``.DS_Store``), and the mirror a second ``chest_xray/chest_xray``.
"""

from pathlib import Path

from selfdistill.data.errors import UserError
from selfdistill.data.formats.images import SUFFIXES
from selfdistill.data.formats.strays import is_stray
from selfdistill.data.sources.layouts import base

NAME = "xray"
TITLE = "chest X-ray pneumonia (Kermany)"
CLASSES = ["NORMAL", "PNEUMONIA"]
#: The official val split has 16 pictures; a larger one is somebody's own division.
FEW = 100


def where(root: Path) -> Path | None:
    """The folder of the splits, if `root` is or holds it, and they hold nothing else.

    Many a set of X-rays has these two classes, among others or in folders of patients.
    """
    wanted = [f"{split}/{name}" for split in ("train", "test") for name in CLASSES]
    found = base.find(root, (".", "chest_xray", "chest_xray/chest_xray"), wanted)
    if found is None:
        return None
    splits = {path.name for path in _inside(found)} - {"chest_xray"}
    if not splits <= {"train", "val", "test"}:
        return None
    folders = [path for split in splits for path in _inside(found / split)]
    if any(path.name not in CLASSES for path in folders):
        return None
    files = [path for one in folders for path in _inside(one)]
    return found if all(path.suffix.lower() in SUFFIXES for path in files) else None


def _inside(folder: Path) -> list[Path]:
    """What lies in a folder, but for other programs' leavings."""
    return [path for path in folder.iterdir() if not is_stray(path.name)]


def read(folder: Path, options: base.Options) -> base.Layout:
    """Reads the splits by folder; see `base.Layout`."""
    splits = {}
    for split in ("train", "val", "test"):
        if not (folder / split).is_dir():
            continue
        rows = []
        for label, name in enumerate(CLASSES):
            found = sorted((folder / split / name).glob("*"))
            pictures = [
                path
                for path in found
                if path.suffix.lower() in SUFFIXES and not is_stray(path.name)
            ]
            if not pictures:
                raise UserError(
                    f"{folder / split / name} has no pictures: extract the official archive again"
                )
            rows += [(f"{name}/{path.name}", label) for path in pictures]
        splits[split] = base.files(folder / split, rows)
    notes = []
    if "val" not in splits:
        notes.append("this archive has no val split; the paper's 5,216 leave out 16 of its train")
    elif len(splits["val"]) <= FEW:
        notes.append(
            f"the official val split has {len(splits['val'])} pictures, too few to choose anything"
            " by: --trainval --val_fraction 0.1 makes a larger one"
        )
    return base.Layout(NAME, CLASSES, splits, notes)
