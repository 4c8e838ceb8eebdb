"""Known data sets in their official layouts, found by their files and read with their splits."""

from pathlib import Path
from typing import Protocol

from selfdistill.data.cli import nearest
from selfdistill.data.errors import UserError
from selfdistill.data.sources.layouts.archive import is_archive, opened
from selfdistill.data.sources.layouts.base import Layout, Options
from selfdistill.data.sources.layouts.images import (
    aircraft,
    cifar100,
    cub,
    dogs,
    dtd,
    elpv,
    flowers,
    xray,
)
from selfdistill.data.sources.layouts.texts import json_lines, tweeteval

__all__ = [
    "NAMES",
    "Layout",
    "Options",
    "detect",
    "is_archive",
    "load",
    "opened",
]


class _Known(Protocol):
    """A layout: a module with these names, or one of several sets that a module knows.

    `OPTIONS`, where a module has it, names those of `Options` that it follows.
    """

    @property
    def NAME(self) -> str: ...

    @property
    def TITLE(self) -> str: ...

    def where(self, root: Path) -> Path | None: ...

    def read(self, folder: Path, options: Options) -> Layout: ...


_IMAGES: tuple[_Known, ...] = (aircraft, cub, xray, dtd, dogs, flowers, cifar100, elpv)
_TEXTS: tuple[_Known, ...] = (
    json_lines.SCIERC,
    json_lines.ACL_ARC,
    json_lines.CHEMPROT,
    tweeteval,
)
_LAYOUTS = {known.NAME: known for known in (*_IMAGES, *_TEXTS)}
NAMES = tuple(_LAYOUTS)


def detect(root: Path) -> str | None:
    """The layout that a folder has.

    Args:
        root: The data set's folder, or the one it was extracted into.

    Returns:
        One of `NAMES`, or None.

    Raises:
        UserError: A known set in a form that is not read (CIFAR-100's pickles).
    """
    return next((name for name, module in _LAYOUTS.items() if module.where(root)), None)


def load(name: str, root: Path, options: Options | None = None) -> Layout:
    """Reads a data set in its official layout; images are only listed, not opened.

    Args:
        name: One of `NAMES`.
        root: The data set's folder, or the one it was extracted into.
        options: See `Options`.

    Returns:
        Classes and splits.

    Raises:
        UserError: An unknown name, files that are missing or do not fit together, or an option that
            the layout cannot follow.
    """
    options = options or Options()
    if name not in _LAYOUTS:
        raise UserError(
            f"unknown layout {name!r}.{nearest(name, NAMES, prefix='')}"
            f" The layouts are: {', '.join(NAMES)}"
        )
    module = _LAYOUTS[name]
    for option in ("fold", "keep_banner"):
        chosen = getattr(options, option) != getattr(Options(), option)
        if chosen and option not in getattr(module, "OPTIONS", ()):
            raise UserError(f"--{option} has no meaning for {module.TITLE}: drop the option")
    folder = module.where(root)
    if folder is None:
        raise UserError(
            f"{root} does not have the files of {module.TITLE}: give the folder that the official"
            " archive extracts to (see `python -m data.pack --help`)"
        )
    layout = module.read(folder, options)
    if options.trainval:
        if "val" not in layout.splits:
            raise UserError(
                f"--trainval: {module.TITLE} has no official val split: drop the option"
            )
        layout.splits["train"] = layout.splits["train"] + layout.splits.pop("val")
    return layout
