"""FGVC Aircraft 2013b (Maji et al. 2013): 100 variants, 3,334 train, 3,333 val, 3,333 test.

    fgvc-aircraft-2013b/data/variants.txt                     one class a line
    fgvc-aircraft-2013b/data/images_variant_{train,val,test}.txt   "1025794 707-320"
    fgvc-aircraft-2013b/data/images/1025794.jpg

The release asks that the 20 rows of copyright notice at the bottom of each picture be removed
before training and evaluation.
"""

import functools
import io
from pathlib import Path

from selfdistill.data import files
from selfdistill.data.formats import images
from selfdistill.data.sources.layouts import base

NAME = "aircraft"
TITLE = "FGVC Aircraft 2013b"
BANNER = 20  # rows
OPTIONS = ("keep_banner",)


def where(root: Path) -> Path | None:
    """The release's ``data`` folder, if `root` is or holds it."""
    places = (".", "data", "fgvc-aircraft-2013b/data")
    return base.find(root, places, ("variants.txt", "images", "images_variant_test.txt"))


def _cropped(path: Path) -> bytes:
    """The picture without its banner, as a PNG."""
    image = images.read(files.read(path, "extract the archive again"))
    if image.height <= BANNER:
        raise ValueError(f"it has {image.height} rows, the banner alone has {BANNER}")
    out = io.BytesIO()
    image.crop((0, 0, image.width, image.height - BANNER)).save(out, "PNG", compress_level=1)
    return out.getvalue()


def read(folder: Path, options: base.Options) -> base.Layout:
    """Reads the official splits; see `base.Layout`."""
    classes = [name for _, name in base.lines(folder / "variants.txt")]
    splits = {}
    for split in ("train", "val", "test"):
        listed = folder / f"images_variant_{split}.txt"
        rows = [
            (f"{image}.jpg", base.number_of(classes, variant, listed))
            for image, variant in base.pairs(listed)
        ]
        samples = base.files(folder / "images", rows)
        if not options.keep_banner:
            samples = [
                s._replace(source=functools.partial(_cropped, folder / "images" / name))
                for s, (name, _) in zip(samples, rows, strict=True)
            ]
        splits[split] = samples
    notes = []
    if not options.keep_banner:
        notes.append(
            "the 20 rows of copyright notice below each picture are cut off, as the release asks"
            " (--keep_banner keeps them)"
        )
    if not options.trainval:
        notes.append("the paper trains on train and val together (6,667 images): --trainval")
    return base.Layout(NAME, classes, splits, notes)
