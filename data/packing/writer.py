"""Writes the shards of a split, and their index."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.progress import Progress

from selfdistill.data.errors import UserError
from selfdistill.data.formats import labels
from selfdistill.data.packing.encoding import ImageModality, Kind
from selfdistill.data.packing.shard import Shard, write_shards
from selfdistill.data.shards import duplicates, manifest
from selfdistill.data.sources.samples import Sample
from selfdistill.data.splits import SPLITS


@dataclass(frozen=True)
class Packed:
    """What became of one split; `left_out` names the unreadable samples, and says why."""

    split: str
    samples: int
    classes: int
    shards: int
    bytes: int
    left_out: list[str]

    @property
    def skipped(self) -> int:
        """Number of unreadable samples that were left out."""
        return len(self.left_out)


def write_index(
    folder: Path,
    shards: Iterable[Shard],
    *,
    split: str,
    classes: Sequence[str],
    kind: Literal["image", "text"],
    entry: dict[str, Any],
    seen: duplicates.Inputs | None = None,
) -> Packed:
    """Writes the index of a split's shards, none of which is read.

    Args:
        folder: Where the tars lie.
        shards: In the order of their numbers.
        split: Its name.
        classes: Their names.
        kind: "image" or "text".
        entry: What the manifest notes of the inputs.
        seen: Called with every input.

    Raises:
        UserError: They hold nothing.
    """
    counts: Counter[int] = Counter()
    listed, left_out = 0, list[str]()
    infos, tables = [], []
    samples: list[Sample | str] = []

    def name(number: int) -> str:
        one = samples[number]
        return one if isinstance(one, str) else one.name

    if seen is not None:
        seen.begin(split, name)
    for shard in shards:
        left_out += shard.left_out
        if shard.info is None:
            continue
        infos.append(shard.info)
        tables.append(shard.members)
        for label in shard.labels:
            counts.update(labels.numbers(label))
            listed += isinstance(label, tuple)
        if seen is not None:
            # A stream's samples are not kept: they may be more than memory holds.
            samples += shard.names or (shard.info.name,) * len(shard.labels)
            for digest, label in zip(shard.digests, shard.labels, strict=True):
                seen.add(digest, label)
    if not infos:
        raise UserError(f"split {split!r} has no readable {kind}: check the source")
    members = np.concatenate(tables)
    manifest.write(
        folder,
        split=split,
        classes=list(classes),
        class_counts=[counts[i] for i in range(len(classes))],
        shards=infos,
        members=members,
        kind=kind,
        image=entry if kind == "image" else None,
        text=entry if kind == "text" else None,
        labelled=listed or None,
    )
    size = sum(info.bytes for info in infos)
    return Packed(split, len(members), len(classes), len(infos), size, left_out)


def stem(name: str, split: str) -> str:
    """First part of the names of a split's shards."""
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', name) or 'data'}-{split}"


def check(split: str, samples_per_shard: int) -> None:
    """Refuses a split of another name, and empty shards.

    Raises:
        UserError: It is one of these.
    """
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r}: give one of {', '.join(SPLITS)}")
    if samples_per_shard < 1:
        raise UserError(f"samples_per_shard is {samples_per_shard}: give 1 or more")


def write_split(
    samples: Iterable[Sample],
    classes: Sequence[str],
    out_dir: Path,
    *,
    kind: Kind | None = None,
    split: str = "train",
    name: str | None = None,
    samples_per_shard: int = 1000,
    overwrite: bool = False,
    skip_broken: bool = False,
    progress: Progress | None = None,
    seen: duplicates.Inputs | None = None,
) -> Packed:
    """Writes one split: its shards, members.npy and manifest.json.

    The tars are the same bytes for the same samples and options: fixed owner, time 0. A list of
    samples is shuffled first (always in the same way), so that a shard holds all classes; an
    iterator is written as it comes. Everything goes to a temporary folder, which is renamed at the
    end.

    Args:
        samples: What to write; all of them have one label, or a tuple of labels, or none.
        classes: Names of the classes; a sample's label is an index into them.
        out_dir: The data set's folder; the split's is made in it.
        kind: How they are stored; by default as images of the published models' size.
        split: "train", "val", "test" or "unlabelled".
        name: First part of the shards' names; by default that of `out_dir`.
        samples_per_shard: Samples in a tar; one with unreadable samples has fewer.
        overwrite: Replace the split if it is there.
        skip_broken: Leave out unreadable samples (counted) where they would be an error.
        progress: Where to show how far it is.
        seen: Called with every input.

    Returns:
        What was written.

    Raises:
        UserError: An unreadable sample, a split that exists, nothing to write.
    """
    check(split, samples_per_shard)
    kind = kind or ImageModality()
    final = out_dir / split
    check_replaceable(final, overwrite)
    total = len(samples) if isinstance(samples, Sized) else None
    task = progress.add_task(split, total=total) if progress is not None else None
    temporary = out_dir / f".{split}.{os.getpid()}.partial"
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed, of this number
    make_folder(temporary)

    def advance() -> None:
        if progress is not None and task is not None:
            progress.advance(task)

    try:
        shards = write_shards(
            samples,
            len(classes),
            temporary,
            kind=kind,
            stem=stem(name or manifest.as_typed(out_dir).name, split),
            samples_per_shard=samples_per_shard,
            skip_broken=skip_broken,
            advance=advance,
        )
        packed = write_index(
            temporary,
            shards,
            split=split,
            classes=classes,
            kind=kind.name,
            entry=kind.entry(),
            seen=seen,
        )
        replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return packed


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it.

    Raises:
        UserError: It cannot be made there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {folder.parent} ({error.strerror}): choose a place that you"
            " may write to"
        ) from None


def check_replaceable(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that exists, unless it holds shards and may be overwritten.

    Raises:
        UserError: It may not be replaced.
    """
    if not folder.exists():
        return
    if not overwrite:
        raise UserError(f"{folder} exists: give another folder, or replace it with --overwrite")
    if folder.is_dir() and not any(folder.iterdir()):
        return
    try:
        manifest.Manifest.load(str(folder))
    except UserError:
        raise UserError(
            f"{folder} holds something other than shards, so --overwrite does not touch it:"
            " give another folder"
        ) from None


def replace(new: Path, final: Path) -> None:
    """Puts a folder in place; the one that was there goes when the new one stands."""
    old = final.with_name(f".{final.name}.{os.getpid()}.old")
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)
