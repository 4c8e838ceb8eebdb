"""python -m data.subset SHARDS OUT --samples N: fewer labels, for learning curves.

OUT gets N training samples of SHARDS, its classes in their shares, one of each at least, and whole
copies of val and test. Unlabelled samples are left out. Smaller subsets of the same seed lie inside
larger ones.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from selfdistill.data import rng
from selfdistill.data.errors import UserError
from selfdistill.data.formats.labels import Label
from selfdistill.data.loading.reader import Reader
from selfdistill.data.packing.encoding import suffix
from selfdistill.data.packing.writer import check_replaceable, replace, write_split
from selfdistill.data.shards import away, manifest, tars
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.sources.division import strata
from selfdistill.data.sources.samples import Sample
from selfdistill.data.splits import DIVIDED, SPLITS, UNLABELLED


@dataclass(frozen=True)
class AsStored:
    """Samples that go from shard to shard as they are (a `data.packing.encoding.Kind`).

    Attributes:
        entries: What the manifest notes of the inputs.
        name: image or text.
    """

    entries: dict[str, Any]
    name: ClassVar[Literal["image", "text"]]
    slow: ClassVar[bool] = False

    def encode(self, sample: Sample) -> tuple[str, bytes]:
        """See `data.packing.encoding.Kind`."""
        assert isinstance(sample.source, bytes)
        stored = str(self.entries.get("stored", "original"))  # data.index does not say
        return stored if stored != "original" else suffix(sample.source), sample.source

    def entry(self) -> dict[str, Any]:
        """See `data.packing.encoding.Kind`."""
        return self.entries

    def notes(self) -> list[str]:
        """See `data.packing.encoding.Kind`."""
        return []


class _StoredImages(AsStored):
    name: ClassVar[Literal["image", "text"]] = "image"


class _StoredTexts(AsStored):
    name: ClassVar[Literal["image", "text"]] = "text"


def choose(classes: NDArray[np.int64], samples: int, seed: int) -> NDArray[np.int64]:
    """Picks samples class by class: one of each, and each class keeps its share, to a sample or so.

    Args:
        classes: int64 [n], class of each sample; of several the rarest.
        samples: How many to take, at most n; of fewer than there are classes some have none.
        seed: Of the choice.

    Returns:
        int64 [samples], sorted numbers of samples; those of fewer samples are a part of them.
    """
    order = rng.permutation(seed, "subset", 0, len(classes))
    # The k-th of a class of m samples stands at (k + 1/2) / m of one line of all samples.
    place = np.empty(len(classes))
    for one in np.unique(classes):
        mine = order[classes[order] == one]
        place[mine] = (np.arange(len(mine)) + 0.5) / len(mine)
        place[mine[0]] -= 1  # before all others
    taken = order[np.argsort(place[order], kind="stable")][:samples]
    return np.sort(taken)


def subset(shards: str, out: str, samples: int, seed: int = 0, overwrite: bool = False) -> None:
    """Writes a smaller training set.

    Args:
        shards: Folder made by data.pack.
        out: Folder of the new set.
        samples: Training samples that it gets.
        seed: Of the choice.
        overwrite: Replace shards that are in `out`.
    """
    for place in (shards, out):
        away.refuse(place, "a subset is made of, and in,")
    source, target = Path(shards), Path(out)
    train = Manifest.load_split(shards, "train")
    if not train.classes:
        raise UserError(f"{shards} has no labels: a subset is taken class by class")
    if not len(train.classes) <= samples <= train.samples:
        raise UserError(
            f"--samples {samples}: {shards} has {train.samples} training samples of"
            f" {len(train.classes)} classes: give a number between these"
        )
    if target.resolve() == source.resolve():
        raise UserError(f"{out} is the source itself: give another folder")
    for split in SPLITS:
        check_replaceable(target / split, overwrite)
    reader = Reader(train)
    found = [label_of(reader, number) for number in range(train.samples)]
    chosen = choose(strata(found), samples, seed)

    def sample(number: int) -> Sample:
        record = reader.record(number)
        # The key that data.pack wrote, without the number that begins it.
        member = tars.split_name(record.name.rpartition(", ")[2])
        key = member[0].partition("-")[2] if member else ""
        return Sample(key or str(number), record.input, found[number])

    stored = train.image if train.kind == "image" else train.text
    kind = (_StoredImages if train.kind == "image" else _StoredTexts)(dict(stored))
    staging = target.parent / f".{target.name}.{os.getpid()}.partial"
    shutil.rmtree(staging, ignore_errors=True)  # see `write_whole`
    try:
        packed = write_split(
            [sample(int(number)) for number in chosen],
            train.classes,
            staging,
            kind=kind,
            name=manifest.as_typed(target).name,
        )
        for split in DIVIDED[1:]:
            if (source / split / manifest.FILE).exists():
                shutil.copytree(source / split, staging / split)
        target.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            if (staging / split).exists():
                replace(staging / split, target / split)
            elif (target / split).exists():  # of the data set that is being replaced
                shutil.rmtree(target / split)
    finally:
        reader.close()
        shutil.rmtree(staging, ignore_errors=True)
    if (source / UNLABELLED / manifest.FILE).exists():
        print(f"note: {source / UNLABELLED} is left out: stages 1 and 2 learn from the part alone")
    print(f"{target / 'train'}: {packed.samples} of {train.samples} samples")


def label_of(reader: Reader, number: int) -> Label:
    """The class of a sample, or its classes.

    Raises:
        UserError: It has none.
    """
    record = reader.record(number)
    if reader.manifest.several:
        return record.labels
    label = record.label
    if label < 0:
        raise UserError(f"{reader.manifest.root}: sample {number} has no label")
    return label


if __name__ == "__main__":
    from selfdistill.data.cli import run

    run(subset)
