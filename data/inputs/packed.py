"""A packed set as inputs: the samples of a split, in the order of their ids."""

import functools
import os
from pathlib import Path

from selfdistill.data.errors import BrokenData, UserError
from selfdistill.data.inputs.base import Input, Inputs, broken
from selfdistill.data.loading.reader import Reader
from selfdistill.data.shards.manifest import FILE, Manifest, is_remote
from selfdistill.data.splits import SPLITS


class Packed(Inputs):
    """A split's samples; `content` is the member as it is stored.

    Args:
        manifest: of the split.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest, self.kind, self.root = manifest, manifest.kind, manifest.root
        self.samples, self.notes = manifest.samples, []
        self.column = "path" if manifest.kind == "image" else "id"
        if not self.samples:
            raise UserError(f"{self.root} has no samples: pack some first (python -m data.pack)")

    @functools.cached_property
    def _reader(self) -> Reader:
        return Reader(self.manifest)

    def read(self, place: int) -> Input:
        """See `Inputs`."""
        try:
            record = self._reader.record(place)
        except BrokenData as error:
            return broken(f"sample {place}", error)
        return Input(record.name.rpartition(", ")[2], record.input)

    def digest(self) -> str:
        """See `Inputs`: the manifest's hash, which stands for all of the data."""
        return self.manifest.hash


def find(root: str, split: str | None) -> Packed | None:
    """The packed set at a place; None where it is none.

    Args:
        root: a data set's folder, one split's, or an address.
        split: which split, where there are several.

    Raises:
        UserError: there are several splits and none is named, it is another, or it is broken.
    """
    if is_remote(root):
        return Packed(Manifest.load_split(root, split) if split else Manifest.load(root))
    root = os.path.expanduser(root)
    folder = Path(root)
    if (folder / FILE).is_file():
        one = Manifest.load(root)
        if split not in (None, one.split):
            raise UserError(
                f"{root} is the split {one.split}, and --split {split} asks for another: give"
                f" {folder.parent}, or leave --split out"
            )
        return Packed(one)
    there = [name for name in SPLITS if (folder / name / FILE).is_file()]
    if not there:
        return None
    if split is None and len(there) > 1:
        raise UserError(
            f"{root} has the splits {', '.join(there)}: name one (--split {there[-1]}, or"
            f" {folder / there[-1]})"
        )
    return Packed(Manifest.load_split(root, split or there[0]))
