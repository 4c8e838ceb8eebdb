"""Writes the shards of a split, with WebDataset's own writer, and their index."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from numpy.typing import NDArray
from rich.progress import Progress

from selfdistill.data import rng
from selfdistill.data.errors import UserError
from selfdistill.data.shards import duplicates, manifest, tars
from selfdistill.data.shards.encoding import ImageModality, Kind
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


def _encoded(
    samples: Iterable[Sample], encode: Callable[[Sample], tuple[str, bytes]]
) -> Iterator[tuple[Sample, Future[tuple[str, bytes]]]]:
    """Encodes in threads (Pillow works outside Python's lock) and yields in order.

    Only a few samples are held at a time, however many there are.
    """
    threads = min(16, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        waiting: list[tuple[Sample, Future[tuple[str, bytes]]]] = []
        try:
            for sample in samples:
                waiting.append((sample, pool.submit(encode, sample)))
                if len(waiting) > 4 * threads:
                    yield waiting.pop(0)
            yield from waiting
        finally:
            for _, future in waiting:
                future.cancel()


def _key(number: int, key: str) -> str:
    """A WebDataset key: no dots (they begin the extension), unique, short enough for any tar."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", key)[-60:].strip("_")
    return f"{number:08d}-{readable}" if readable else f"{number:08d}"


def index_tars(
    folder: Path, names: list[str]
) -> tuple[list[manifest.ShardInfo], NDArray[np.int64]]:
    """Shards and table of members of tars as `write_split` makes them, in this order."""
    shards, tables = [], []
    for name in names:
        path = folder / name
        rows: dict[str, list[int]] = {}
        for member in tars.scan(path):
            key, extension = tars.split_name(member.name) or (member.name, "")
            row = rows.setdefault(key, [-1, -1, -1, -1])
            at = 2 if extension == "cls" else 0
            row[at : at + 2] = member.offset, member.size
        size = path.stat().st_size
        shards.append(manifest.ShardInfo(name, tars.sha256_of(path), size, len(rows)))
        tables.append(np.array(list(rows.values()), dtype=np.int64).reshape(-1, 4))
    return shards, np.concatenate(tables)


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
        samples: What to write.
        classes: Names of the classes; a sample's label is an index into them.
        out_dir: The data set's folder; the split's is made in it.
        kind: How they are stored; by default as images of the published models' size.
        split: "train", "val", "test" or "unlabelled".
        name: First part of the shards' names; by default that of `out_dir`.
        samples_per_shard: Samples in a tar.
        overwrite: Replace the split if it is there.
        skip_broken: Leave out unreadable samples (counted) where they would be an error.
        progress: Where to show how far it is.
        seen: Called with every input.

    Returns:
        What was written.

    Raises:
        UserError: An unreadable sample, a split that exists, nothing to write.
    """
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r}: give one of {', '.join(SPLITS)}")
    if samples_per_shard < 1:
        raise UserError(f"samples_per_shard is {samples_per_shard}: give 1 or more")
    kind = kind or ImageModality()
    final = out_dir / split
    check_replaceable(final, overwrite)
    total = len(samples) if isinstance(samples, Sized) else None
    if isinstance(samples, Sequence):
        samples = [samples[i] for i in rng.permutation(0, "pack", 0, len(samples))]
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", name or manifest.as_typed(out_dir).name) or "data"
    task = progress.add_task(split, total=total) if progress is not None else None
    temporary = out_dir / f".{split}.{os.getpid()}.partial"
    make_folder(temporary)
    try:
        counts: Counter[int] = Counter()
        written, left_out = 0, list[str]()
        packed: list[Sample] | None = [] if isinstance(samples, Sequence) else None
        names: list[str] = []
        if seen is not None:
            # A stream's samples are not kept: they may be more than memory holds.
            seen.begin(
                split, lambda number: packed[number].name if packed else f"sample {number + 1}"
            )
        with webdataset.ShardWriter(
            str(temporary).replace("%", "%%") + f"/{name}-{split}-%06d.tar",
            maxcount=samples_per_shard,
            maxsize=2**40,
            post=lambda path: names.append(Path(path).name),
            verbose=0,
            encoder=False,
            mtime=0,
            user="root",
            group="root",
        ) as writer:
            for sample, future in _encoded(samples, kind.encode):
                try:
                    extension, content = future.result()
                except ValueError as error:
                    if not skip_broken:
                        raise UserError(
                            f"{sample.name}: the {kind.name} cannot be read: {error}: mend or"
                            f" remove it, or leave such {kind.name}s out with --skip_broken"
                        ) from None
                    left_out.append(f"{sample.name}: {error}")
                    continue
                finally:
                    if progress is not None and task is not None:
                        progress.advance(task)
                record: dict[str, str | bytes] = {
                    "__key__": _key(written, sample.key),
                    extension: content,
                }
                if sample.label is not None:
                    if not 0 <= sample.label < len(classes):
                        raise UserError(
                            f"{sample.name}: label {sample.label} is outside the"
                            f" {len(classes)} classes: correct it"
                        )
                    record["cls"] = str(sample.label).encode()
                    counts[sample.label] += 1
                if seen is not None:
                    seen.add(duplicates.digest(content), sample.label)
                    if packed is not None:
                        packed.append(sample)
                writer.write(record)
                written += 1
        if not written:
            raise UserError(f"split {split!r} has no readable {kind.name}: check the source")
        shards, members = index_tars(temporary, names)
        entry: dict[str, Any] = {kind.name: kind.entry()}
        manifest.write(
            temporary,
            split=split,
            classes=list(classes),
            class_counts=[counts[i] for i in range(len(classes))],
            shards=shards,
            members=members,
            kind=kind.name,
            **entry,
        )
        replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    total_bytes = sum(s.bytes for s in shards)
    return Packed(split, written, len(classes), len(shards), total_bytes, left_out)


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
