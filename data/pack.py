"""python -m data.pack SOURCE OUT: folders of images, or a CSV -> WebDataset shards with an index.

SOURCE is one of
  a folder of class folders            SOURCE/CLASS/*.jpg        divided by --splits
  a folder with splits                 SOURCE/{train,val,test}/CLASS/*.jpg
  a CSV file with a header             path,label[,split]        paths relative to the file
  a folder of images without classes   with --unlabelled
  a known data set's own archive       recognised by its files, or named with --layout

OUT/{train,val,test}/ then hold shards NAME-SPLIT-000000.tar, manifest.json and members.npy.
"""

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data import images, keyed, manifest, sources, tars
from data.errors import UserError
from data.sources import Sample, Splits

# The size of the published ViT-MAE models.
DEFAULT_SIZE = 224


@dataclass(frozen=True)
class Packed:
    """What became of one split."""

    split: str
    samples: int
    classes: int
    shards: int
    bytes: int
    skipped: int


def _content(sample: Sample) -> bytes:
    """The sample's file."""
    if isinstance(sample.source, Path):
        try:
            return sample.source.read_bytes()
        except OSError as error:
            raise ValueError(f"it cannot be opened ({error.strerror})") from None
    return sample.source if isinstance(sample.source, bytes) else sample.source()


def _encode(sample: Sample, size: int | None, keep_original: bool) -> tuple[str, bytes]:
    """Extension and bytes of the sample as it is stored."""
    content = _content(sample)
    if not keep_original:
        return "png", images.prepare(content, size)
    images.read(content)  # only to see that it can be read
    if isinstance(sample.source, Path):
        return sample.source.suffix.lower().lstrip(".") or "img", content
    return _suffix(content), content


def _suffix(content: bytes) -> str:
    """The extension of an image file that has no name."""
    import io

    kind = (Image.open(io.BytesIO(content)).format or "img").lower()
    return {"jpeg": "jpg"}.get(kind, kind)


def _name(sample: Sample) -> str:
    return str(sample.source) if isinstance(sample.source, Path) else sample.key


def _encoded(
    samples: Iterable[Sample], encode: Callable[[Sample], tuple[str, bytes]]
) -> Iterator[tuple[Sample, Future[tuple[str, bytes]]]]:
    """Encodes in threads (Pillow works outside Python's lock) and yields in order."""
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


def _index(folder: Path, names: list[str]) -> tuple[list[manifest.ShardInfo], NDArray[np.int64]]:
    """Shards and table of members of tars written by `write_split`."""
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
    split: str = "train",
    name: str | None = None,
    size: int | None = DEFAULT_SIZE,
    keep_original: bool = False,
    samples_per_shard: int = 1000,
    overwrite: bool = False,
    skip_broken: bool = False,
    progress: Progress | None = None,
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
        split: "train", "val" or "test".
        name: First part of the shards' names; by default that of `out_dir`.
        size: Side in pixels of the square that images are fitted to; None keeps their own.
        keep_original: Store the files as they are.
        samples_per_shard: Samples in a tar.
        overwrite: Replace the split if it is there.
        skip_broken: Leave out unreadable images (counted) where they would be an error.
        progress: Where to show how far it is.

    Returns:
        What was written.

    Raises:
        UserError: An unreadable image, a split that exists, nothing to write.
    """
    if split not in manifest.SPLITS:
        raise UserError(f"there is no split {split!r}: give one of {', '.join(manifest.SPLITS)}")
    if samples_per_shard < 1:
        raise UserError(f"samples_per_shard is {samples_per_shard}: give 1 or more")
    if size is not None and size < 1:
        raise UserError(f"size is {size} pixels: give 1 or more")
    final = out_dir / split
    check_replaceable(final, overwrite)
    total = len(samples) if isinstance(samples, Sequence) else None
    if isinstance(samples, Sequence):
        samples = [samples[i] for i in keyed.permutation(0, "pack", 0, len(samples))]
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", name or out_dir.resolve().name) or "data"
    task = progress.add_task(split, total=total) if progress is not None else None
    temporary = out_dir / f".{split}.{os.getpid()}.partial"
    temporary.mkdir(parents=True)
    try:
        counts: Counter[int] = Counter()
        written = skipped = 0
        names: list[str] = []
        with webdataset.ShardWriter(
            str(temporary / f"{name}-{split}-%06d.tar"),
            maxcount=samples_per_shard,
            maxsize=2**40,
            post=lambda path: names.append(Path(path).name),
            verbose=0,
            encoder=False,
            mtime=0,
            user="root",
            group="root",
        ) as writer:
            for sample, future in _encoded(samples, lambda s: _encode(s, size, keep_original)):
                try:
                    extension, content = future.result()
                except ValueError as error:
                    if not skip_broken:
                        raise UserError(
                            f"{_name(sample)}: the image cannot be read: {error}: mend or remove"
                            " it, or leave such images out with --skip_broken"
                        ) from None
                    skipped += 1
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
                            f"{_name(sample)}: label {sample.label} is outside the"
                            f" {len(classes)} classes: correct it"
                        )
                    record["cls"] = str(sample.label).encode()
                    counts[sample.label] += 1
                writer.write(record)
                written += 1
        if not written:
            raise UserError(f"split {split!r} has no readable image: check the source folder")
        shards, members = _index(temporary, names)
        manifest.write(
            temporary,
            split=split,
            classes=list(classes),
            class_counts=[counts[i] for i in range(len(classes))],
            shards=shards,
            members=members,
            image={
                "size": None if keep_original else size,
                "stored": "original" if keep_original else "png",
                "fit": None if keep_original or size is None else "short side bicubic, centre crop",
            },
        )
        replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    total_bytes = sum(s.bytes for s in shards)
    return Packed(split, written, len(classes), len(shards), total_bytes, skipped)


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


def choose_size(splits: Splits) -> int:
    """The side to fit images to when none is asked for.

    Args:
        splits: The samples.

    Returns:
        The images' own side where the first 64 of each split are squares of one size up to 224
        pixels; else 224, that of the published models.
    """
    import io

    sizes: set[tuple[int, int]] = set()
    for samples, _ in splits.values():
        for sample in samples[:64]:
            try:
                sizes.add(Image.open(io.BytesIO(_content(sample))).size)
            except (OSError, ValueError, Image.DecompressionBombError):
                return DEFAULT_SIZE
    width, height = sizes.pop() if len(sizes) == 1 else (0, 1)
    return width if width == height <= DEFAULT_SIZE else DEFAULT_SIZE


def pack(
    source: str,
    out: str,
    size: int | None = None,
    keep_original: bool = False,
    splits: str | None = None,
    unlabelled: bool = False,
    split: str | None = None,
    layout: str | None = None,
    name: str | None = None,
    samples_per_shard: int = 1000,
    seed: int = 0,
    skip_broken: bool = False,
    overwrite: bool = False,
) -> None:
    """Packs images into WebDataset shards with an index.

    Args:
        source: Folder of class folders, folder with {train,val,test}/CLASS, CSV with
            path,label[,split], or a known data set's own files.
        out: The data set's folder, e.g. shards/cub.
        size: Side in pixels; images are fitted to this square (short side bicubic, centre crop) and
            stored as PNG. By default their own if they are squares of one size up to 224, else 224.
        keep_original: Store the files as they are; training then fits them each time.
        splits: Shares of train, val and test where the source has no splits; default 0.8,0.1,0.1,
            taken class by class at random.
        unlabelled: Take all images without labels, whatever folders they lie in.
        split: Pack everything as this one split (train, val or test) of `out`.
        layout: Name of a known data set's own layout, where it is not recognised by itself.
        name: First part of the shards' names; by default that of `out`.
        samples_per_shard: Samples in a tar.
        seed: Of the division into splits.
        skip_broken: Leave unreadable images out, and say how many.
        overwrite: Replace shards that are in `out`.
    """
    console = Console(stderr=True)
    out_dir, root = Path(out), Path(source)
    if split is not None and split not in manifest.SPLITS:
        raise UserError(f"there is no split {split!r}: give one of {', '.join(manifest.SPLITS)}")
    if keep_original and size is not None:
        raise UserError("--keep_original stores files as they are, --size changes them: give one")
    if out_dir.is_file():
        raise UserError(f"{out} is a file: give a folder")
    if root.exists() and out_dir.resolve() == root.resolve():
        raise UserError(f"{out} is the source itself: give another folder for the shards")
    for one in (split,) if split else manifest.SPLITS:
        check_replaceable(out_dir / one, overwrite)
    found = sources.find(
        root, layout=layout, unlabelled=unlabelled, shares=splits, split=split, seed=seed
    )
    if not keep_original and size is None:
        size = choose_size(found)
        console.print(f"size {size} x {size} pixels (another one: --size)")
    staging = out_dir.parent / f".{out_dir.name}.{os.getpid()}.partial"
    columns = (
        TextColumn("{task.description:>5}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=console) as progress:
            done = [
                write_split(
                    samples,
                    classes,
                    staging,
                    split=one,
                    name=name or out_dir.resolve().name,
                    size=size,
                    keep_original=keep_original,
                    samples_per_shard=samples_per_shard,
                    skip_broken=skip_broken,
                    progress=progress,
                )
                for one, (samples, classes) in found.items()
            ]
        out_dir.mkdir(parents=True, exist_ok=True)
        for one in (split,) if split else manifest.SPLITS:
            if one in found:
                replace(staging / one, out_dir / one)
            elif (out_dir / one).exists():  # of the data set that is being replaced
                shutil.rmtree(out_dir / one)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for p in done:
        skipped = f", {p.skipped} unreadable images left out" if p.skipped else ""
        print(
            f"{out_dir / p.split}: {p.samples} samples, {p.classes} classes, {p.shards} shards,"
            f" {p.bytes / 1e6:.1f} MB{skipped}"
        )


if __name__ == "__main__":
    from data.cli import run

    run(pack)
