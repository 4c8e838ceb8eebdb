"""CIFAR-100 (Krizhevsky 2009), the binary version: 50,000 train, 10,000 test, 32 x 32.

    cifar-100-binary/fine_label_names.txt    one class a line
    cifar-100-binary/{train,test}.bin        records of 1 coarse label, 1 fine label, 3,072 pixels

The pixels are three 32 x 32 planes, red, green, blue. The Python version is made of pickles, which
run code when they are read; it is refused, since the binary version holds the same images.
"""

import functools
import io
from pathlib import Path

import numpy as np
from PIL import Image

from selfdistill.data.errors import UserError
from selfdistill.data.sources.layouts import base
from selfdistill.data.sources.samples import Sample

NAME = "cifar100"
TITLE = "CIFAR-100, binary version"
SIDE = 32
RECORD = 2 + 3 * SIDE * SIDE  # bytes


def where(root: Path) -> Path | None:
    """The folder of the ``.bin`` files.

    Raises:
        UserError: The folder holds the pickled version.
    """
    wanted = ("train.bin", "test.bin", "fine_label_names.txt")
    if found := base.find(root, (".", "cifar-100-binary"), wanted):
        return found
    pickled = base.find(root, (".", "cifar-100-python"), ("train", "test", "meta"))
    if pickled and (pickled / "meta").is_file():
        raise UserError(
            f"{pickled} is CIFAR-100's Python version, made of pickles, which run code when read:"
            " take the binary version (cifar-100-binary.tar.gz), which holds the same images"
        )
    return None


def _png(path: Path, record: int) -> bytes:
    """One record's picture as a PNG file."""
    with path.open("rb") as file:
        file.seek(record * RECORD + 2)
        planes = np.frombuffer(file.read(RECORD - 2), dtype=np.uint8)
    out = io.BytesIO()
    pixels = np.ascontiguousarray(planes.reshape(3, SIDE, SIDE).transpose(1, 2, 0))
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()


def read(folder: Path, options: base.Options) -> base.Layout:
    """Reads the official splits; see `base.Layout`."""
    classes = [name for _, name in base.lines(folder / "fine_label_names.txt")]
    splits = {}
    for split in ("train", "test"):
        path = folder / f"{split}.bin"
        size = path.stat().st_size
        if size == 0 or size % RECORD:
            raise UserError(
                f"{path} has {size} bytes, not {RECORD} for each picture: extract the archive again"
            )
        # Only the labels are held in memory: one byte of each record.
        labels = np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, RECORD)[:, 1]
        if int(labels.max()) >= len(classes):
            raise UserError(
                f"{path} has label {labels.max()} and fine_label_names.txt {len(classes)} names:"
                " extract the archive again"
            )
        splits[split] = [
            Sample(f"{split}_{row:05d}", functools.partial(_png, path, row), int(label))
            for row, label in enumerate(labels)
        ]
    return base.Layout(NAME, classes, splits)
